"""Workloads of real clients and peers: at a server, what clients tell of their data; elsewhere, its own data alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.storage.strict_yaml import parse_yaml
from gossamer.workloads.base import Batch, Sums, Workload

LOCAL, VALIDATION = ("local_", "worst_client_"), "validation_"


class _Around:
    """Does what another workload does, but for what is defined here."""

    def __init__(self, workload: Workload) -> None:
        self._around = workload

    def __getattr__(self, name: str) -> Any:
        """Return the other workload's attribute."""
        return getattr(self._around, name)


class ToldWorkload(_Around):
    """A server's workload, whose clients hold other data than its own: as many samples, of the labels, as they tell.

    Attributes:
        num_samples: int64 [num_clients]; those of its own partition until a client tells its number.
    """

    def __init__(self, workload: Workload) -> None:
        """Take a workload, from which the model and the test data are."""
        super().__init__(workload)
        self.num_samples = workload.num_samples.copy()
        self._labels = workload.client_labels(np.arange(workload.num_clients)).clone()

    def tell(self, client: int, num_samples: int, labels: Iterable[int]) -> None:
        """Take what a client tells of its data, for the rounds that are planned from now on."""
        self.num_samples[client] = num_samples
        self._labels[client] = False
        self._labels[client, list(labels)] = True

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return the metrics of the server's test data; those of clients' are theirs to tell."""
        found = self._around.metrics(sums)
        return {name: value for name, value in found.items() if not name.removeprefix(VALIDATION).startswith(LOCAL)}

    def client_labels(self, clients: NDArray[np.int64]) -> Tensor:
        """Return bool [s, num_labels]: the labels that each client holds."""
        return self._labels[torch.from_numpy(clients)]


class HeldWorkload(_Around):
    """The workload of a client, or of a peer, with data of its own: made of one client. Others are never trained here.

    Attributes:
        num_clients: clients, or peers, of the run.
        num_samples: int64 [num_clients], its number of samples; nothing is known of others, who count as many.
    """

    def __init__(self, workload: Workload, num_clients: int) -> None:
        """Take a workload made with ``num_clients=1``."""
        super().__init__(workload)
        self.num_clients = num_clients
        self.num_samples = np.repeat(workload.num_samples, num_clients)

    def hold(self, clients: NDArray[np.int64], chunks: NDArray[np.int64]) -> None:
        """Read now what would be read while training of the one client."""
        self._around.hold(np.zeros_like(clients), chunks)

    def batch(self, clients: NDArray[np.int64], positions: NDArray[np.int64], round: int = 0, phase: int = 0) -> Batch:
        """Assemble samples of the one client."""
        return self._around.batch(np.zeros_like(clients), positions, round, phase)

    def client_labels(self, clients: NDArray[np.int64]) -> Tensor:
        """Return the labels of the one client, for each of `clients`."""
        return self._around.client_labels(np.zeros_like(clients))

    def client_holdings(self, clients: NDArray[np.int64]) -> NDArray[np.int16]:
        """Return what the one client holds, for each of `clients`."""
        return self._around.client_holdings(np.zeros_like(clients))

    def client_statistics(self, params: dict[str, Tensor], client: int) -> dict[str, Tensor]:
        """Return sums over the one client's training data."""
        return self._around.client_statistics(params, 0)

    def client_metrics(self, sums: Sums, client: int) -> dict[str, float]:
        """Return metrics of the one client's test data."""
        return self._around.client_metrics(sums, 0)

    def client_counts(self, sums: Sums, client: int) -> dict[str, tuple[float, float]]:
        """Return sums and numbers of samples of the one client's test data."""
        return self._around.client_counts(sums, 0)


def spec_of(text: str) -> Any:
    """Return the data set that ``--data`` names: a mapping in YAML, a folder or a file, or a name.

    A folder of folders is of images (``image-folder``), one of ``.npy`` files, or an ``.npz`` file, is of ``arrays``, a
    ``.csv`` or ``.parquet`` file, or a folder of the latter, is a ``table``; anything else is the name of a data set or
    ``module:attribute``. Of a folder with ``train`` and ``test``, be they folders, or files of tables, ``test`` is for
    testing; else a share of each class is held out.

    Raises:
        ConfigError: it is a folder, or a file, of something else.
    """
    if text.lstrip().startswith("{"):
        return parse_yaml(text, "--data")
    path = Path(text)
    if not path.exists():
        return text
    if (parts := _parts_of(path)) is not None:
        return {"name": "table", "path": parts[0], "test_path": parts[1]}
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    suffixes = {one.suffix.lower() for one in found if one.is_file()}
    if any(one.is_dir() for one in found):
        name = "image-folder"
    elif suffixes & {".npz", ".npy"}:
        name = "arrays"
    elif suffixes & {".csv", ".parquet"}:
        name = "table"
    else:
        raise ConfigError(
            f"--data {text!r} is neither a folder of images nor a table: give {{name: NAME, path: PATH}}, see gossamer"
            " describe dataset"
        )
    return {"name": name, "path": str(path.absolute())}


def _parts_of(folder: Path) -> tuple[str, str] | None:
    """Return the tables ``train`` and ``test`` of a folder; None: it has none."""
    for suffix in (".parquet", ".csv", ""):
        parts = [folder / f"{name}{suffix}" for name in ("train", "test")]
        if all(one.is_file() or (one.is_dir() and any(one.glob("*.parquet"))) for one in parts):
            return str(parts[0].absolute()), str(parts[1].absolute())
    return None
