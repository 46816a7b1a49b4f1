"""What no simulator of peers can undercut: the batched matrix products of one gradient, and one copy of all models.

The products run over blocks that stay in the cache, into memory that is used again.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from common import RoundClock
from peers_common import BATCH_SIZE, LAYERS, make_parser, read_options

BLOCK_BYTES = 4 << 20  # of models, and of samples, that are multiplied at once


class Products:
    """The matrix products of one gradient of all peers' models."""

    def __init__(self, layers: list[tuple[int, int]], peers: int) -> None:
        """Make weights [n, outputs, inputs] of every layer and samples [n, batch, inputs]."""
        self.layers = layers
        self.weights = [torch.rand(peers, outputs, inputs) for inputs, outputs in layers]
        self.samples = torch.rand(peers, BATCH_SIZE, layers[0][0])
        floats = max(sum(inputs * outputs for inputs, outputs in layers), BATCH_SIZE * layers[0][0])
        self.rows = min(peers, BLOCK_BYTES // (4 * floats))
        self.flops = sum(2 * 2 * peers * BATCH_SIZE * inputs * outputs for inputs, outputs in layers)
        self.flops += sum(2 * peers * BATCH_SIZE * inputs * outputs for inputs, outputs in layers[1:])

    def multiply(self, peers: slice) -> None:
        """Do the products of some peers once: outputs, gradients by weights and, after the first layer, by inputs."""
        grads = [torch.empty_like(weight[: self.rows]) for weight in self.weights]
        deltas = [torch.rand(self.rows, outputs, BATCH_SIZE) for _, outputs in self.layers]
        outputs = [torch.empty_like(delta) for delta in deltas]
        for low in range(peers.start, peers.stop, self.rows):
            rows = min(self.rows, peers.stop - low)
            weights = [weight[low : low + rows] for weight in self.weights]
            inputs = [self.samples[low : low + rows].transpose(1, 2), *(output[:rows] for output in outputs)]
            for weight, received, output in zip(weights, inputs, outputs, strict=False):
                torch.bmm(weight, received, out=output[:rows])
            for layer in reversed(range(len(weights))):
                torch.bmm(deltas[layer][:rows], inputs[layer].transpose(1, 2), out=grads[layer][:rows])
                if layer:
                    torch.bmm(weights[layer].transpose(1, 2), deltas[layer][:rows], out=deltas[layer - 1][:rows])


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    options, _ = read_options(make_parser("Matrix products and a copy, every thread with its share of the peers."))
    torch.set_num_threads(1)  # of torch's own
    layers = LAYERS[options.model]
    products = Products(layers, options.peers)
    models = torch.rand(options.peers, sum((inputs + 1) * outputs for inputs, outputs in layers))
    copied = torch.empty_like(models)
    edges = [options.peers * thread // options.threads for thread in range(options.threads + 1)]
    shares = [slice(low, high) for low, high in itertools.pairwise(edges)]
    clock, stamps = RoundClock(options), []
    with ThreadPoolExecutor(options.threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        for _ in range(options.total_rounds):
            began = time.perf_counter()
            list(pool.map(products.multiply, shares))
            multiplied = time.perf_counter()
            list(pool.map(lambda share: copied[share].copy_(models[share]), shares))
            stamps.append((multiplied - began, time.perf_counter() - multiplied))
            clock.tick()
    timed = stamps[options.warmup :]
    line = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "peers": options.peers,
        "flops": products.flops,
        "copied_bytes": copied.nbytes,
        "first_round_seconds": sum(stamps[0]),
        "round_seconds": [sum(pair) for pair in timed],
        "phase_seconds": {"products": [pair[0] for pair in timed], "copy": [pair[1] for pair in timed]},
        "readings": clock.readings,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
