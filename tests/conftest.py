"""What all tests share: modules found by name, plug-ins included, one thread, and samples of the large sweeps.

Several threads would fight with the workers that tests start, and with other tests, for the same few processors.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from gossamer import registry
from gossamer.engines.ray.cluster import start_ray

HERE = Path(__file__).parent

sys.path[:0] = [str(HERE), str(HERE / "plugins")]
torch.set_num_threads(1)

# Nothing here cuts the power, and what a killed process wrote stays: waiting for the disk takes longer than most runs.
os.fsync = os.fstat  # which refuses what is not open, too

# Ray's actors, 15 by default, would get what the tests of other processes leave, and take a minute to start.
os.environ.setdefault("RAY_worker_niceness", "0")

# Processes inherit which signals are ignored, as in the background or under nohup, and a run leaves these alone.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)

# How long examples take to draw depends on what else the machine does.
UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("sample", max_examples=25, **UNTIMED)
settings.register_profile("whole", max_examples=100, **UNTIMED)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of sweeps."""
    parser.addoption("--all-sweeps", action="store_true", help="run every case of every sweep, and more examples")
    parser.addoption("--sweep-seed", help="seed of the samples of sweeps; default: the commit that is checked out")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one process more than there are processors: tests that start others wait for a third of their time."""
    return (os.cpu_count() or 1) + 1


def pytest_configure(config: pytest.Config) -> None:
    """Settle what is sampled; xdist hands these options on, so that all of its workers collect the same tests."""
    from sampling import commit

    config.addinivalue_line(
        "markers", "sweep(keep, at_least=2, together=()): run a share of the cases; see sampling.py"
    )
    config.option.all_sweeps |= any("::" in name for name in config.args) or bool(config.option.keyword)
    config.option.sweep_seed = config.option.sweep_seed or commit(HERE)
    settings.load_profile("whole" if config.option.all_sweeps else "sample")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how a selection can be repeated."""
    seed = config.option.sweep_seed
    sample = f"sweeps were sampled: --sweep-seed {seed} repeats the selection, --all-sweeps runs every case"
    terminalreporter.write_line("every case of all sweeps was run" if config.option.all_sweeps else sample)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands out tests to workers in whole files; None where xdist was told another way."""
    from scheduling import ByFile

    return ByFile(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not sampled, and begin with what takes long, so that no worker has that left at the end."""
    from sampling import left_out
    from scheduling import turn

    items.sort(key=lambda item: turn(item.nodeid))
    if not config.option.all_sweeps:
        dropped = left_out(items, config.option.sweep_seed)
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=list(dropped))
    gc.collect()
    gc.freeze()  # what was imported stays, and neither this process nor those that it forks look through it again


@pytest.fixture(autouse=True)
def no_plug_ins_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what other tests loaded, or errors of theirs that are meant to pass would count as those of plug-ins."""
    monkeypatch.setattr(registry, "_LOADED", {})


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write a small file of spoken digits where GOSSAMER_DATA names it, and return its arrays."""
    from made_recordings import recordings, write

    arrays = recordings()
    write(tmp_path / "data", arrays)
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / "data"))
    return arrays


@pytest.fixture(scope="session")
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a Ray, which all runs in this process find and use; `scheduling` gives such tests to one worker.

    It has four CPUs and is told of two GPUs, which are not there.

    Returns:
        The folder of the plug-in `gate` in Ray's processes, which inherit what is set when Ray starts.
    """
    folder = tmp_path_factory.mktemp("gate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATE", str(folder))
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')
        leave = start_ray(None, 4)
    yield folder
    leave()
