"""Sends bad messages to a server: ``python tests/fuzz/messages.py --number 10000 --seed NAME``; prints JSON.

The server is a process of its own, which unpickles nothing, as an audit hook sees. None of the messages may be taken,
none may be a fault of the server's; it grows by less than `MAX_GROWTH_BYTES`, and takes a good message at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from gossamer.transport import Received, Server
from hostile_messages import EXPECTED, KINDS, LIMITS, ROW, TAKEN, Attacker, cases, expectations, good

MAX_GROWTH_BYTES = 64 << 20
FAULTS = ("failed: INTERNAL", "failed: UNKNOWN")


def serve() -> None:
    """Take messages until standard input ends; print the address, then what came."""
    unpickled: Counter[str] = Counter()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "pickle.find_class":
            unpickled[str(arguments)] += 1

    sys.addaudithook(watch)
    pickle.Unpickler(io.BytesIO(pickle.dumps(Path("x")))).load()
    assert unpickled, "the hook sees nothing"
    unpickled.clear()
    with Server("127.0.0.1:0", limits=LIMITS, accept=expectations()) as server:
        print(server.address, flush=True)
        sys.stdin.readline()
        taken, right = [], True
        while (event := server.receive(0.0)) is not None:
            if isinstance(event, Received):
                taken.append(event.message.address.round)
                right = right and torch.equal(event.message.arrays["row"], ROW)
        report = {"taken": taken, "right": right, "dropped": server.dropped, "unpickled": sum(unpickled.values())}
        print(json.dumps(report), flush=True)


def resident_bytes(process: int) -> int:
    """Return the memory that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def main() -> int:
    """Send them, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        attacker = Attacker(process.stdout.readline().strip())
        assert attacker.send(good(TAKEN)) == "taken"
        for _, frames in cases(2 * len(KINDS), "warm-up"):  # threads and arenas are there from then on
            attacker.send(frames)
        before, began = resident_bytes(process.pid), time.monotonic()
        highest, answers, slowest = before, Counter[str](), 0.0
        for name, frames in cases(arguments.number, arguments.seed):
            start = time.monotonic()
            answers[f"{name}: {attacker.send(frames)}"] += 1
            slowest = max(slowest, time.monotonic() - start)
            highest = max(highest, resident_bytes(process.pid))
        seconds = time.monotonic() - began
        accepted_good = attacker.send(good(EXPECTED)) == "taken"
        process.stdin.write("\n")
        process.stdin.flush()
        report = json.loads(process.stdout.readline())
    wrong = [answer for answer in answers if answer.endswith(("taken", *FAULTS))]
    passed = (
        not wrong
        and accepted_good
        and report["taken"] == [TAKEN.round, EXPECTED.round]
        and report["right"]
        and report["unpickled"] == 0
        and highest - before < MAX_GROWTH_BYTES
        and process.returncode == 0
    )
    print(
        json.dumps(
            {
                "messages": arguments.number,
                "seed": arguments.seed,
                "passed": passed,
                "applied": len(report["taken"]) - 2,
                "wrong": wrong,
                "growth_bytes": highest - before,
                "resident_bytes": before,
                "seconds": seconds,
                "slowest_seconds": slowest,
                "unpickled": report["unpickled"],
                "answers": dict(answers),
            },
            indent=1,
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
