"""Flower's SuperLink and one SuperNode for each client, as processes that talk over loopback, and `flwr run`.

Insecure, because the server of gossamer that it is compared with is, too. Without telemetry, look-ups of newer
versions and installing of what the app needs. What Flower waits for between two looks for work is its own, but for
--poll-interval.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from common import make_parser, read_options

from quiet import descendants

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
LIMIT_SECONDS = 900.0
CONNECTION = '[superlink]\ndefault = "benchmark"\n\n[superlink.benchmark]\naddress = "{address}"\ninsecure = true\n'


def free_port() -> int:
    """Return the number of a port that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment(home: Path, poll_interval: float | None) -> dict[str, str]:
    """Return the environment of Flower's processes: nothing is asked of the internet."""
    own = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONPATH": str(HERE),
        "PATH": os.pathsep.join((str(BIN), os.environ["PATH"])),
    }
    if poll_interval is not None:
        own["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(poll_interval)
    return {**os.environ, **own}


class Processes:
    """Flower's processes, in a folder of their own."""

    def __init__(self, home: Path, variables: dict[str, str]) -> None:
        """Start nothing yet."""
        self.home, self.variables, self.running = home, variables, list[subprocess.Popen[bytes]]()

    def start(self, name: str, *arguments: str) -> None:
        """Start one of Flower's commands, which writes a log."""
        with (self.home / f"{name}-{len(self.running)}.log").open("wb") as log:
            command = [str(BIN / name), *arguments]
            self.running.append(subprocess.Popen(command, env=self.variables, stdout=log, stderr=log))

    def wait(self, file: Path) -> str:
        """Return what is in a file, once it is there.

        Raises:
            SystemExit: a process has ended, or it takes too long.
        """
        end = time.monotonic() + LIMIT_SECONDS
        while not file.exists():
            if time.monotonic() > end or any(process.poll() is not None for process in self.running):
                said = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.home.glob("*.log"))
                raise SystemExit(f"Flower's run did not end well:\n{said}")
            time.sleep(0.1)
        return file.read_text()

    def close(self) -> None:
        """Kill them, and what they have started: SuperExecs would outlive their SuperNodes, and keep cores busy."""
        for process in descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for one in self.running:
            one.wait()


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    parser = make_parser("FedAvg by Flower's SuperLink and SuperNodes.")
    parser.add_argument("--poll-interval", type=float, help="seconds between looks for tasks, if not Flower's own 1.0")
    options, own = read_options(parser)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home, result = Path(folder), Path(folder) / "report.json"
        processes = Processes(home, environment(home, own.poll_interval))
        port = free_port()
        (home / "config.toml").write_text(CONNECTION.format(address=f"127.0.0.1:{port}"))
        try:
            processes.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
            listening = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < listening:
                time.sleep(0.1)
            for client in range(options.clients):
                where = ["--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(free_port())]
                part = f"partition-id={client} num-partitions={options.clients}"
                processes.start("flower-supernode", "--insecure", *where, "--node-config", part)
            changes = f'model="{options.model}" clients={options.clients} samples={options.samples}'
            changes += f" batch-size={options.batch_size} seed={options.seed} rounds={options.rounds}"
            changes += f' warmup={options.warmup} result="{result}"'
            command = [str(BIN / "flwr"), "run", str(HERE / "flower_app"), "benchmark", "--run-config", changes]
            subprocess.run(command, env=processes.variables, check=True, stdout=sys.stderr, timeout=120)
            print(processes.wait(result), end="", flush=True)
        finally:
            processes.close()


if __name__ == "__main__":
    main()
