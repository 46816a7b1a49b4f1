"""Sum up the runs of an experiment, and hold them against what theory and publications say.

    python experiments/expect.py RUNS experiments/NAME/expected.json [--write --command "..."]

Prints a table: mean and extent over the seeds of what every method reached, and what it cost. Ends with exit code 1 if
an entry of "theory" or "published" does not hold. With --write, "measured" is replaced by the table; it is not checked.

Entries of "theory" and "published" look like these, each with "what" is claimed and the "source" that says so:

    {"metric": "accuracy", "larger": "all-large", "smaller": "all-small"}
    {"metric": "accuracy", "larger": "federated", "smaller_mean": ["local-0", "local-1"]}
    {"metric": "bits_per_character", "method": "rolling", "below": "unigram_bits"}
    {"metric": "total_client_flops", "larger": "dense", "smaller": "sparse", "times": 1.9}
    {"metric": "accuracy", "method": "rolling", "value": 0.69, "tolerance": 0.02}
    {"metric": "accuracy", "method": "sparse", "near": "dense", "tolerance": 0.02}
    {"metric": "rounds_to_gradient_norm", "method": "ou-equidyn", "at_most": 100}

The first holds if the worst seed of one method beats the best seed of the other: beyond the seeds' band; with "times",
that many times the other. The second holds if that worst seed beats the mean of several methods, the third if the worst
seed stays below another metric, and the last, and "at_least", if the worst seed needs no more, or reaches it. "value"
and "near" are of means over seeds: a figure, and another method from which it may be short by the tolerance.
With {"levels": {"gradient_norm": 1e-7}} in expected.json, rounds_to_gradient_norm is the first round in which a run is
at or below that level; where a seed never is, the method has no such number, and entries about it do not hold.
Entries with "comparable": false are printed beside what was measured and not judged: another setting, or a figure that
nobody has checked against its source.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from gossamer.errors import GossamerError
from gossamer.reports.curves import SingleRun, find_runs, group

Values = dict[str, dict[str, Any]]
PERFORMANCE = (
    "accuracy",
    "recall",
    "cider",
    "bits_per",
    "unigram",
    "distance",
    "gradient_norm",
)  # parts of metrics' names
COSTS = ("total_client_flops", "simulated_seconds", "wall_seconds")


def last_values(run: SingleRun, levels: dict[str, float]) -> dict[str, float]:
    """Return a run's numbers: metrics of its last evaluation, totals of its last round, rounds to reach `levels`."""
    final = run.records[-1]
    found = {key: value for key, value in final.items() if any(part in key for part in PERFORMANCE)}
    for metric, level in levels.items():
        reached = [record["round"] for record in run.records if record.get(metric, float("inf")) <= level]
        found |= {f"rounds_to_{metric}": reached[0]} if reached else {}
    found["loss"] = final.get("loss", float("nan"))
    found |= {key: final[key] for key in COSTS if key in final}
    found["train_seconds"] = sum(record.get("phase_seconds.train", 0.0) for record in run.records)
    found["total_bytes"] = final["total_bytes_up"] + final["total_bytes_down"]
    return found


def summarize(directory: Path, levels: dict[str, float]) -> tuple[Values, list[int]]:
    """Return ``{method: {metric: {mean, lowest, highest}}}`` and the seeds."""
    values: Values = {}
    seeds: set[int] = set()
    for curve in group(find_runs([directory])):
        finals = [last_values(run, levels) for run in curve.runs]
        seeds |= {int(run.config["seed"]) for run in curve.runs}
        values[curve.label] = {
            key: {
                "mean": significant(statistics.mean(one[key] for one in finals)),
                "lowest": significant(min(one[key] for one in finals)),
                "highest": significant(max(one[key] for one in finals)),
            }
            for key in finals[0]
            if all(key in one for one in finals)
        }
    return values, sorted(seeds)


def significant(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def judge(entry: dict[str, Any], values: Values) -> tuple[bool | None, str]:
    """Say whether an entry holds (None: it is not judged), and in which numbers."""
    metric = entry["metric"]
    named = [entry[key] for key in ("method", "larger", "smaller", "near") if key in entry] + entry.get(
        "smaller_mean", []
    )
    if metric.startswith("rounds_to_") and any(metric not in values.get(method, {metric}) for method in named):
        return False, f"a seed of {' or '.join(named)} never gets there"
    if any(metric not in values.get(method, {}) for method in named):
        return None, f"not all of {', '.join(named)} are measured"
    if "below" in entry:
        highest, level = values[entry["method"]][metric]["highest"], values[entry["method"]][entry["below"]]["mean"]
        return bool(highest < level), f"{metric} at most {highest}, {entry['below']} {level}"
    if "at_most" in entry:
        highest = values[entry["method"]][metric]["highest"]
        return bool(highest <= entry["at_most"]), f"{metric} at most {highest}, bound {entry['at_most']}"
    if "at_least" in entry:
        lowest = values[entry["method"]][metric]["lowest"]
        return bool(lowest >= entry["at_least"]), f"{metric} at least {lowest}, bound {entry['at_least']}"
    if "near" in entry:
        mean, other = (values[entry[key]][metric]["mean"] for key in ("method", "near"))
        told = f"{entry['method']} {mean}, {entry['near']} {other}, at most {entry['tolerance']} less"
        return bool(mean >= other - entry["tolerance"]), told
    if "smaller_mean" in entry:
        worst = values[entry["larger"]][metric]["lowest"]
        mean = statistics.mean(values[method][metric]["mean"] for method in entry["smaller_mean"])
        return bool(worst > mean), f"{entry['larger']} at least {worst}, mean of the others {significant(mean)}"
    if "larger" in entry:
        larger, smaller = values[entry["larger"]][metric], values[entry["smaller"]][metric]
        told = f"{entry['larger']} {larger['lowest']} .. {larger['highest']}"
        told += f", {entry['smaller']} {smaller['lowest']} .. {smaller['highest']}"
        holds = bool(larger["lowest"] > entry.get("times", 1) * smaller["highest"])
        told += f", {entry['times']} times as much" if "times" in entry else ""
        if entry.get("comparable", True) is False:
            return None, f"{'so it is' if holds else 'not so'} here: {told}"
        return holds, told
    mean = values[entry["method"]][metric]["mean"]
    told = f"{entry['method']}: {entry['value']} there, {mean} here"
    if entry.get("comparable", True) is False:
        return None, told
    return abs(mean - entry["value"]) <= entry["tolerance"], told


def table(values: Values) -> str:
    """Return one line a method: accuracies, and costs."""
    keys = [key for key in next(iter(values.values())) if not key.endswith("_seconds") or key == "simulated_seconds"]
    lines = []
    for method, found in values.items():
        lines.append(method)
        for key in keys:
            if key in found:
                extent = found[key]
                lines.append(f"  {key:<36} {extent['mean']:>10.4g}  {extent['lowest']:.4g} .. {extent['highest']:.4g}")
    return "\n".join(lines)


def current_commit() -> str:
    """Return the short name of the commit that is checked out."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Read, print, judge; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory that 'gossamer run' made")
    parser.add_argument("expected", type=Path, help="expected.json of the experiment")
    parser.add_argument("--write", action="store_true", help="replace 'measured' by these runs")
    parser.add_argument("--command", default="", help="the command that made the runs, to be written beside them")
    parser.add_argument("--commit", help="the commit that made them; else the current one")
    arguments = parser.parse_args()
    expected = json.loads(arguments.expected.read_text()) if arguments.expected.exists() else {}
    try:
        values, seeds = summarize(arguments.runs, expected.get("levels", {}))
    except GossamerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(values))
    failed = False
    for kind in ("theory", "published"):
        for entry in expected.get(kind, []):
            holds, told = judge(entry, values)
            verdict = {True: "holds", False: "DOES NOT HOLD", None: "not judged"}[holds]
            print(f"{kind}: {entry['what']}: {verdict} ({told})")
            failed |= holds is False
    if arguments.write:
        expected["measured"] = {
            "command": arguments.command,
            "commit": arguments.commit or current_commit(),
            "machine": f"{platform.machine()}, CPU",
            "seeds": seeds,
            "values": values,
        }
        arguments.expected.write_text(json.dumps(expected, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
