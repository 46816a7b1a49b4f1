"""What peers do in a round, what they send, and how long it takes: against sums and events by hand."""

from __future__ import annotations

import heapq
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import LEVELS, modes
from gossamer import run, topology
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.planning.assignment import Capacities, assign_devices
from gossamer.planning.peers import PeerPlanner
from gossamer.planning.schedule import ScheduleOptions
from gossamer.round_record import RoundCosts
from gossamer.simulation.costs import Costs, VariantCosts
from gossamer.simulation.devices import DeviceProfile, DeviceShare
from gossamer.simulation.traffic import Traffic
from gossamer.topology import Topology
from slow_peers import LEAST_SQUARES, decentralized

SIZE = 64 * 32 + 32 + 32 * 10 + 10  # numbers of the perceptron
VARIANTS = [VariantCosts(level, int(10 * level), int(40 * level), int(40 * level), 4 * level, 0) for level in LEVELS]
QUICK = DeviceProfile(flops_per_second=8.0, upload_bytes_per_second=20.0, download_bytes_per_second=50.0)
SLOW = DeviceProfile(
    flops_per_second=2.0, upload_bytes_per_second=5.0, download_bytes_per_second=10.0, latency_seconds=0.5
)


def planner(graph: Topology, *profiles: DeviceProfile, **changes: Any) -> PeerPlanner:
    """Return a planner of peers with 5 to 24 samples each, three capacities, two epochs of batches of 8."""
    entries = [DeviceShare(profile=profile) for profile in profiles or (QUICK, SLOW)]
    options: dict[str, Any] = {
        "num_rounds": 10,
        "num_samples": np.arange(graph.n) % 20 + 5,
        "topology": graph,
        "capacities": Capacities(LEVELS, [2, 1, 1], "fixed", graph.n, 3),
        "costs": [Costs(VARIANTS, assign_devices(entries, "fixed", graph.n, 3))],
        "epochs": 2,
        "steps": None,
        "batch_size": 8,
        "lr": 0.1,
        "schedule": ScheduleOptions(),
    }
    return PeerPlanner(**(options | changes))


def slow_exchange(found: PeerPlanner, round: int) -> RoundCosts:
    """Play a round event by event: who is ready to send, what is on its way, who has everything."""
    edges = found.topology.mixing(round).edges()
    latency, bandwidth = edges.latency_seconds, edges.bandwidth_bytes_per_second
    n, devices = found.topology.n, found.costs[0].devices
    profile = [devices.profiles[int(devices.of(np.array([i]), round)[0])] for i in range(n)]
    own = [VARIANTS[int(found.capacities.variants(np.array([i]), round)[0])] for i in range(n)]
    flops = [own[i].flops_per_sample * int(found.trained[i]) for i in range(n)]
    computed = [flops[i] / profile[i].flops_per_second for i in range(n)]
    complete, bytes_down, bytes_up, uploading = list(computed), [0] * n, 0, 0.0
    queue: list[tuple[float, str, int]] = [(computed[i], "ready", i) for i in range(n)]
    heapq.heapify(queue)
    while queue:
        now, what, which = heapq.heappop(queue)
        if what == "arrives":
            receiver, sender = int(edges.receiver[which]), int(edges.sender[which])
            complete[receiver] = max(complete[receiver], now)
            bytes_down[receiver] += own[sender].bytes_up
            continue
        links = np.flatnonzero(edges.sender == which)
        taken = len(links) * own[which].bytes_up / profile[which].upload_bytes_per_second
        bytes_up += len(links) * own[which].bytes_up
        uploading += taken
        for link in links.tolist():
            on_the_way = 0.0 if latency is None or math.isnan(latency[link]) else latency[link]
            if bandwidth is not None and not math.isnan(bandwidth[link]):
                on_the_way += own[which].bytes_up / bandwidth[link]
            heapq.heappush(queue, (now + profile[which].latency_seconds + taken + on_the_way, "arrives", link))
    downloading = [bytes_down[i] / profile[i].download_bytes_per_second for i in range(n)]
    return RoundCosts(
        bytes_up,
        sum(bytes_down),
        sum(flops),
        max(complete[i] + downloading[i] for i in range(n)),
        sum(downloading),
        sum(computed),
        uploading,
        num_samples=float(found.trained.sum()),
    )


def assert_close(found: RoundCosts, expected: RoundCosts) -> None:
    assert vars(found) == pytest.approx(vars(expected), rel=1e-9)


def graphml(path: Path, links: list[tuple[int, int, dict[str, float]]]) -> Path:
    """Write a network."""
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(sorted({end for link in links for end in link[:2]}))
    graph.add_edges_from(links)
    networkx.write_graphml(graph, path)
    return path


class TestSimulatedTime:
    @given(
        name=st.sampled_from(["ring", "star", "od-equidyn", "random-match", "base", "el-local", "ceca", "complete"]),
        n=st.integers(3, 12),
        seed=st.integers(0, 99),
        round=st.integers(0, 9),
    )
    def test_event_by_event(self, name: str, n: int, seed: int, round: int) -> None:
        parameters = {"degree": 2} if name == "el-local" else {}
        found = planner(topology.build(name, n, seed, **parameters))
        assert_close(found.phases(round, 0.0)[0].costs, slow_exchange(found, round))

    @given(data=st.data(), n=st.integers(2, 8))
    def test_links_of_a_file(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n: int) -> None:
        """Latency and bandwidth are known of some links."""
        value = st.one_of(st.none(), st.floats(0.5, 30.0))
        pairs = {(i, data.draw(st.integers(0, i - 1))) for i in range(1, n)} | {(n - 1, 0)}
        links = []
        for i, j in sorted(pairs):
            known = {"latency_seconds": data.draw(value), "bandwidth_bytes_per_second": data.draw(value)}
            links.append((i, j, {name: number for name, number in known.items() if number is not None}))
        path = graphml(tmp_path_factory.mktemp("network") / "network.graphml", links)
        found = planner(topology.build("file", path=path))
        assert_close(found.phases(0, 0.0)[0].costs, slow_exchange(found, 0))

    def test_half_the_bandwidth_of_a_link_doubles_its_transfer(self, tmp_path: Path) -> None:
        seconds = []
        for number, bandwidth in enumerate([None, 4.0, 2.0]):
            link = {"latency_seconds": 0.25} | ({} if bandwidth is None else {"bandwidth_bytes_per_second": bandwidth})
            graph = topology.build("file", path=graphml(tmp_path / f"{number}.graphml", [(0, 1, link)]))
            alike = {"capacities": Capacities(LEVELS, [0, 0, 1], "fixed", 2, 3), "num_samples": np.array([8, 8])}
            seconds.append(planner(graph, QUICK, **alike).phases(0, 0.0)[0].costs.simulated_seconds)
        assert seconds[0] == pytest.approx(2 * 8 * 4 / 8.0 + 40 / 20.0 + 0.25 + 40 / 50.0)
        assert seconds[1] - seconds[0] == pytest.approx(40 / 4.0)
        assert seconds[2] - seconds[0] == pytest.approx(2 * (40 / 4.0))

    def test_in_a_run(self, tmp_path: Path) -> None:
        """A network that ships here: links of known latency and bandwidth."""
        path = Path(__file__).parents[2] / "topologies/internet-50.yaml"
        graph = topology.load(path, seed=0)
        edges = graph.mixing(0).edges()
        assert edges.latency_seconds is not None
        changes = LEAST_SQUARES | {"rounds": 2, "peers": {"topology": str(path)}, "device.latency_seconds": 2.0}
        done = run(decentralized(changes), out=tmp_path / "run")
        device, size = DeviceProfile(), 8 * 5
        degree = np.bincount(edges.sender, minlength=graph.n)
        transfer = 0.0 if edges.bandwidth_bytes_per_second is None else size / edges.bandwidth_bytes_per_second
        way = np.nan_to_num(edges.latency_seconds) + np.nan_to_num(transfer)
        arrival = np.zeros(graph.n)
        np.maximum.at(arrival, edges.receiver, 2.0 + degree[edges.sender] * size / device.upload_bytes_per_second + way)
        compute = done.metrics[0]["total_client_flops"] / graph.n / device.flops_per_second
        one = float((compute + arrival + degree * size / device.download_bytes_per_second).max())
        seconds = [record["simulated_seconds"] for record in done.metrics]
        assert seconds == pytest.approx([one, 2 * one], rel=1e-9)


class TestMerges:
    """Global averages over links of a file."""

    def merged(self, path: Path, links: list[tuple[int, int, dict[str, float]]]) -> tuple[PeerPlanner, RoundCosts]:
        graph = topology.build("file", path=graphml(path, links))
        alike = {"capacities": Capacities(LEVELS, [0, 0, 1], "fixed", graph.n, 3)}
        found = planner(graph, SLOW, **alike, merge_every=1)
        return found, found.phases(0, 0.0)[0].costs

    def test_of_two(self, tmp_path: Path) -> None:
        """There and back over a link of half a second."""
        found, costs = self.merged(tmp_path / "a.graphml", [(0, 1, {"latency_seconds": 0.5})])
        compute = 2.0 * found.trained  # 4 FLOPs a sample, 2 a second
        way = SLOW.latency_seconds + 40 / 5 + 0.5 + 40 / 10
        assert costs.simulated_seconds == pytest.approx(max(compute[0], compute[1] + way) + way, abs=1e-6)
        assert (costs.bytes_up, costs.bytes_down) == (80, 80)

    @given(data=st.data(), n=st.integers(2, 9))
    def test_of_trees(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n: int) -> None:
        """Where there is but one path between two peers, against a recursion over the tree, from one of its roots."""
        value = st.floats(0.0, 30.0)
        link = st.fixed_dictionaries({"latency_seconds": value, "bandwidth_bytes_per_second": st.floats(0.5, 30.0)})
        links = [(data.draw(st.integers(0, i - 1)), i, data.draw(link)) for i in range(1, n)]
        found, costs = self.merged(tmp_path_factory.mktemp("network") / "a.graphml", links)
        compute, near = 2.0 * found.trained, dict[int, dict[int, float]]()
        for one, other, known in links:
            way = known["latency_seconds"] + 40 / known["bandwidth_bytes_per_second"]
            near.setdefault(one, {})[other] = near.setdefault(other, {})[one] = way

        def gathered(peer: int, parent: int) -> float:
            arrivals = [gathered(child, peer) + 0.5 + 8 + way for child, way in near[peer].items() if child != parent]
            return max([float(compute[peer]), *arrivals]) + 4 * len(arrivals)

        def spread(peer: int, parent: int, time: float) -> float:
            children = {child: way for child, way in near[peer].items() if child != parent}
            sent = time + 0.5 + 8 * len(children)
            return max([time, *(spread(child, peer, sent + way + 4) for child, way in children.items())])

        by_root = [spread(root, -1, gathered(root, -1)) for root in range(n)]
        assert any(math.isclose(costs.simulated_seconds, time, rel_tol=1e-6) for time in by_root)
        assert costs.simulated_seconds <= 2 * min(by_root)
        assert costs.bytes_up == costs.bytes_down == 2 * (n - 1) * 40

    def test_shortcuts_are_taken(self, tmp_path: Path) -> None:
        links = [(0, 1, {"latency_seconds": 500.0}), (1, 2, {"latency_seconds": 1.0}), (2, 0, {"latency_seconds": 1.0})]
        assert self.merged(tmp_path / "a.graphml", links)[1].simulated_seconds < 200

    def test_in_a_run(self, tmp_path: Path) -> None:
        path = graphml(tmp_path / "a.graphml", [(0, 1, {"latency_seconds": 0.5})])
        changes = LEAST_SQUARES | {"rounds": 2, "peers": {"topology": str(path), "final_merge": True}}
        seconds = [record["simulated_seconds"] for record in run(decentralized(changes), out=tmp_path / "run").metrics]
        assert seconds[0] == pytest.approx(0.5, abs=0.01)
        assert seconds[1] - seconds[0] == pytest.approx(1.0, abs=0.01)


class TestOverlap:
    @given(name=st.sampled_from(["ring", "star", "od-equidyn", "el-local"]), seed=st.integers(0, 9))
    def test_the_longer_of_training_and_messages(self, name: str, seed: int) -> None:
        graph = topology.build(name, 7, seed)
        found, messages_alone = planner(graph, overlaps=[True]), planner(graph, overlaps=[True])
        messages_alone.trained = 0 * found.trained
        computed = found.costs[0].efforts(found.peers, found.capacities.variants(found.peers, 0), found.trained, 0)
        expected = max(computed.compute_seconds.max(), slow_exchange(messages_alone, 0).simulated_seconds)
        assert found.phases(0, 0.0)[0].costs.simulated_seconds == pytest.approx(expected)
        assert found.phases(0, 0.0)[0].costs.bytes_up == planner(graph).phases(0, 0.0)[0].costs.bytes_up

    def test_as_long_as_each_of_them(self) -> None:
        """Training takes 0.4 s, and so do messages: 0.4 s together, where one follows the other 0.8 s."""
        device = DeviceProfile(flops_per_second=80.0, upload_bytes_per_second=1e9, latency_seconds=0.4)
        alike = {"capacities": Capacities(LEVELS, [0, 0, 1], "fixed", 4, 3), "num_samples": np.full(4, 8), "epochs": 1}
        for overlaps, expected in ((True, 0.4), (False, 0.8)):
            found = planner(topology.build("ring", 4), device, **alike, overlaps=[overlaps])
            assert found.phases(0, 0.0)[0].costs.simulated_seconds == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize(
        ("algorithm", "expected"),
        [
            ({"name": "dsgd"}, False),
            ({"name": "dsgd", "order": "combine-while-adapt"}, True),
            ({"name": "dsgd", "order": "combine-while-adapt", "mix_momentum": True}, False),
        ],
        ids=str,
    )
    def test_of_a_configuration(self, algorithm: dict[str, Any], expected: bool) -> None:
        """Momentum that is mixed is known after local steps only."""
        found = build(parse(decentralized({"algorithm": algorithm, "train.momentum": 0.9} | modes()))).planner
        assert isinstance(found, PeerPlanner)
        assert found.overlaps == [expected]


class TestBytes:
    @pytest.mark.parametrize(
        ("algorithm", "row_bytes"),
        [
            ({"name": "dsgd"}, 4 * SIZE),
            ({"name": "dsgt"}, 2 * 4 * SIZE),
            ({"name": "push-sum"}, 4 * SIZE + 4),
            ({"name": "choco-sgd", "compressor": {"name": "random-k", "k": 7}}, 4 * 7),
            ({"name": "choco-sgd", "compressor": {"name": "top-k", "k": 7}}, (4 + 4) * 7),
            ({"name": "choco-sgd", "compressor": "sign"}, math.ceil(SIZE / 8) + 4),
            ({"name": "dsgd-ceca"}, 4 * SIZE),
        ],
        ids=str,
    )
    def test_messages_times_rows(self, algorithm: dict[str, Any], row_bytes: int) -> None:
        name = {"dsgd-ceca": "ceca", "choco-sgd": "star", "dsgt": "od-equidyn"}.get(algorithm["name"], "erdos-renyi")
        changes = {"algorithm": algorithm, "peers.topology": name, "peers.num": 7}
        parts = build(parse(decentralized(changes)))
        graph = parts.task.topology
        assert graph is not None
        for round in range(3):
            costs = parts.planner.phases(round, 0.0)[0].costs
            mixing = graph.mixing(round)
            assert costs.bytes_up == sum(len(mixing.send_ranks(i)) for i in range(7)) * row_bytes
            assert costs.bytes_down == sum(len(mixing.recv_ranks(i)) for i in range(7)) * row_bytes

    def test_mixed_momentum_and_float64(self) -> None:
        changes = {"algorithm": {"name": "dsgd", "mix_momentum": True}, "train.momentum": 0.9}
        parts = build(parse(decentralized(LEAST_SQUARES | changes)))
        assert parts.planner.phases(0, 0.0)[0].costs.bytes_up == 8 * 2 * 2 * 5 * 8

    @pytest.mark.parametrize("changes", [{"merge_every": 3}, {"final_merge": True}, {}], ids=str)
    def test_a_merge_is_an_all_reduce(self, changes: dict[str, Any]) -> None:
        """A ring all-reduce: 2 (n - 1) steps in which every peer sends an n-th of its row."""
        graph = topology.build("ring", 8)
        alike = {"capacities": Capacities(LEVELS, [0, 0, 1], "fixed", 8, 3)}
        found = planner(graph, SLOW, **alike, num_rounds=7, **changes)
        merges = {"merge_every": [2, 5], "final_merge": [6]}.get(next(iter(changes), ""), [])
        for round in range(7):
            timed = found.phases(round, 0.0)[0]
            assert timed.plan.mixing == ("mean" if round in merges else "topology")
            if round not in merges:
                assert_close(timed.costs, slow_exchange(found, round))
                continue
            per_step = 40 / 8 / min(SLOW.upload_bytes_per_second, SLOW.download_bytes_per_second) + SLOW.latency_seconds
            compute = float(found.trained.max()) * 4 / SLOW.flops_per_second
            assert timed.costs.bytes_up == timed.costs.bytes_down == 8 * 14 * 40 / 8
            assert timed.costs.simulated_seconds == pytest.approx(compute + 14 * per_step)


class TestRounds:
    @pytest.mark.parametrize("name", ["one-peer-exp", "base", "simple-base", "ceca", "ring", "od-equidyn", "el-oracle"])
    def test_remembered_rounds_are_those_of_the_topology(self, name: str) -> None:
        """Looked up in any order, and once more."""
        parameters = {"degree": 4} if name == "el-oracle" else {}
        graph = topology.build(name, 11, 1, **parameters)
        found = planner(graph)
        rounds = [*range(13), *reversed(range(13)), 64, 70]
        for round in rounds:
            assert_close(found.phases(round, 0.0)[0].costs, slow_exchange(found, round))
        if graph.schedule.cycle is not None:
            assert graph.schedule.cycle < 13

    def test_repeated_rounds_differ(self) -> None:
        """The comparison above could fail: the rounds of a cycle do not cost the same."""
        found = planner(topology.build("simple-base", 11))
        assert len({found.phases(round, 0.0)[0].costs.bytes_up for round in range(8)}) > 1

    @given(
        num_samples=st.lists(st.integers(1, 30), min_size=2, max_size=9),
        batch_size=st.integers(1, 9),
        epochs=st.one_of(st.none(), st.integers(1, 3)),
        steps=st.integers(1, 12),
        round=st.integers(0, 9),
        assignment=st.sampled_from(["fixed", "dynamic"]),
    )
    def test_rows_steps_and_samples(
        self, num_samples: list[int], batch_size: int, epochs: int | None, steps: int, round: int, assignment: str
    ) -> None:
        n = len(num_samples)
        found = planner(
            topology.build("complete", n),
            num_samples=np.array(num_samples),
            capacities=Capacities(LEVELS, [1, 1, 1], assignment, n, 3),
            batch_size=batch_size,
            epochs=epochs,
            steps=None if epochs is not None else steps,
        )
        plan = found.plan(round)
        assert sorted(plan.client.tolist()) == list(range(n))
        keys = list(zip(plan.variant.tolist(), (-plan.steps).tolist(), plan.client.tolist(), strict=True))
        assert keys == sorted(keys)
        for peer, num_steps, variant in zip(plan.client, plan.steps, plan.variant, strict=True):
            sizes = [min(batch_size, num_samples[peer] - at) for at in range(0, num_samples[peer], batch_size)]
            goes_through = sizes * epochs if epochs is not None else (sizes * steps)[:steps]
            assert num_steps == len(goes_through)
            assert found.trained[peer] == sum(goes_through)
            assert variant == found.capacities.variants(np.array([peer]), round)[0]
        again = found.plan(round)
        assert again.digest() == plan.digest()

    def test_learning_rates(self) -> None:
        schedule = ScheduleOptions(name="multistep", milestones=[2], factor=0.5)
        found = planner(topology.build("ring", 4), schedule=schedule)
        assert [found.plan(round).lr for round in range(4)] == [0.1, 0.1, 0.05, 0.05]

    def test_of_a_configuration(self) -> None:
        changes = {"algorithm": {"name": "gossip-pga", "period": 2}, "rounds": 4} | modes()
        parts = build(parse(decentralized(changes)))
        assert [parts.planner.plan(round).mixing for round in range(4)] == ["topology", "mean"] * 2
        sooner = build(parse(decentralized(changes | {"peers.merge_every": 3})))
        assert [sooner.planner.plan(round).mixing for round in range(4)] == ["topology", "topology", "mean", "topology"]


def test_a_complete_graph_of_many_peers_is_not_listed() -> None:
    """Everybody sends to and hears from all others, but a hundred million links are not written down."""
    traffic = Traffic.of(topology.build("complete", n=10_001).mixing(0))
    assert traffic.links is None
    assert (traffic.sent == 10_000).all()
    assert (traffic.received == 10_000).all()
