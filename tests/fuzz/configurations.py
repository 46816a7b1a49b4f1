"""Bad configurations: small good ones, with entries or characters changed at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

IMAGES = {
    "dataset": {"name": "synthetic", "num_train": 40, "num_test": 10, "noise": 2.0},
    "model": {"name": "mlp", "hidden": [8]},
}
TRAIN = {"lr": 0.1, "batch_size": 8, "epochs": 1, "schedule": {"name": "multistep", "milestones": [1], "factor": 0.5}}
CLIENTS = {"num": 6, "per_round": 3, "partition": {"name": "dirichlet", "alpha": 1.0, "min_samples": 1}}
ENGINE = {"name": "local", "workers": 0, "block_size": 4}
COMMON: dict[str, Any] = {"name": "fuzz", "seed": 0, "rounds": 2, "train": TRAIN, "engine": ENGINE}
GOOD: list[dict[str, Any]] = [
    COMMON | {"workload": IMAGES, "clients": CLIENTS, "algorithm": {"name": "fedavg", "server_lr": 1.0}},
    COMMON
    | {
        "workload": IMAGES | {"label_mask": "none"},
        "clients": CLIENTS | {"deadline_seconds": 100.0, "over_selection": 1.5, "quorum": 0.1},
        "algorithm": "fedrolex",
        "submodel": {"capacities": [1.0, 0.5], "shares": [1, 2], "stride": 2, "assignment": "dynamic"},
        "devices": [{"profile": "phone-low", "capacity": 0.5}, {"profile": {"name": "laptop"}, "capacity": 1.0}],
        "evaluation": {"every": 2, "by_capacity": True},
        "checkpoint": {"every_seconds": 0, "keep": 2},
    },
    COMMON | {"workload": IMAGES, "clients": CLIENTS, "algorithm": {"name": "scaffold"}, "log": {"sinks": []}},
    COMMON
    | {
        "workload": {"name": "least-squares", "heterogeneity": 1.0},
        "clients": CLIENTS | {"partition": "iid"},
        "methods": {"one": {"train.lr": 0.01}, "two": {"algorithm": "fedadam"}},
        "seeds": [0, 1],
    },
    COMMON
    | {
        "workload": {"name": "logistic-regression"},
        "peers": {"num": 6, "topology": {"name": "od-equidyn", "M": 3, "eta": 0.5}, "merge_every": 2},
        "algorithm": {"name": "dsgd"},
    },
    COMMON
    | {
        "workload": {"name": "consensus"},
        "peers": {"topology": {"name": "file", "path": "graph.txt", "weights": "metropolis"}, "final_merge": True},
        "algorithm": "dsgt",
        "train": {"lr": 0.01, "steps": 1},
    },
    COMMON
    | {
        "workload": {"name": "logistic-regression", "precision": "single"},
        "clients": CLIENTS | {"partition": "iid", "weighting": "equal", "sampler": "uniform"},
        "algorithm": {"name": "fednova"},
        "device": "device.yaml",
        "aggregation": {"max_update_norm_ratio": 100.0},
    },
    COMMON
    | {
        "workload": IMAGES | {"validation": 0.25},
        "clients": CLIENTS | {"partition": {"name": "shards", "per_client": 2}},
        "algorithm": {"name": "fjord"},
        "submodel": {"capacities": [0.5, 1.0], "offsets": {}, "strategy": "static"},
        "engine": ENGINE | {"modes": {"stacked": False, "padding": False}},
    },
    COMMON
    | {
        "workload": {"name": "least-squares"},
        "peers": {"num": 5, "topology": "graph.yaml"},
        "algorithm": {"name": "choco-sgd", "gamma": 0.5},
        "train": {"lr": 0.01, "steps": 2},
    },
]
FILES = {
    "graph.txt": "a b\nb c\nc d\nd a\n",
    "graph.yaml": "topology: ring\nn: 5\nparameters: {}\nsource: a test\n",
    "device.yaml": "name: box\nflops_per_second: 1.0e+9\nupload_bytes_per_second: 1.0e+6\n"
    "download_bytes_per_second: 1.0e+6\nsource: a test\n",
}
VALUES: list[Any] = [
    *(None, True, False, "", " ", "a", "0", "1e-3", "nan", "~", "../up", "/", ".", "a/b", "graph.txt", "no.yaml"),
    *(0, 1, -1, 2, 3, 7, 1000, -1000, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320, 1e-30, 1e30, 1e308, -1e308),
    *(float("inf"), float("-inf"), float("nan"), 10**400, -(10**30), [], [[]], [0], [1, 1], [1, "a"], [None], [-1]),
    *({}, {"name": "a"}, {"name": None}, {"a": 1}, {"": 0}, [{}], {"name": []}, "x" * 300, "x" * 5000, "\0", "a\nb"),
    *("\u2028", "\U0001f600", "\ud7ff", "%s", "{0}", "$HOME", "~root", "*", "a b", "subprocess:call", "os:system"),
    *("mine:thing", "a:b:c", ":", "a:", ":a", "gossamer:run", "builtins:print", "torch.nn:Linear", "fedavg", "dsgd"),
    *("d2", "ring", "file", "iid", "rolling", "mlp", "digits", "synthetic", "local", "auto", "cosine", "graph.yaml"),
    *("graph.graphml", "device.yaml", "/dev/null", "/proc/self/mem", "http://localhost/x", "laptop"),
]
KEYS = ["name", "num", "lr", "path", "n", "seed", "seeds", "methods", "rounds", "topology", "peers", "clients", "x", ""]
KEYS += ["a.b", "capacity", "train.lr", "workload.dataset", "engine.modes"]
CHARACTERS = "{}[]:,-#&*!|>'\"%@`?\t\n \\~=<0123456789.eE+axyz\0\x07\x85\ufeff\u2028\U0001f600"
INSERTS = ["!!int ", "!!float ", "!!python/none ", "!x ", "&a ", "*a ", "<<: *a\n", "? ", "--- ", "...\n", "[" * 40]
INSERTS += ["2001-01-01 ", "2001-99-99 ", "12:30:45 ", "0x ", "1_0 ", "!!binary ", "!!timestamp ", "{a: " * 40, "null"]


def paths(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry below `data`."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*here, key)
        yield from paths(data[key], (*here, key))


def change(data: dict[str, Any], draw: random.Random) -> None:
    """Change one entry in place."""
    path = draw.choice(list(paths(data)) or [("name",)])
    parent: Any = data
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], draw.randrange(8)
    if kind < 4:
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 4:
        del parent[key]
    elif kind == 5 and isinstance(parent, dict):
        parent[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 6:
        parent[key] = draw.choice([[parent[key]], {"name": parent[key]}, str(parent[key])])
    elif isinstance(parent, dict) and key in parent:
        parent[draw.choice(KEYS)] = parent.pop(key)


def spoil(text: str, draw: random.Random) -> str:
    """Change characters or lines of a text."""
    at, kind = draw.randrange(len(text) + 1), draw.randrange(6)
    lines = text.splitlines(keepends=True) or [""]
    if kind == 0:
        return text[:at] + draw.choice(CHARACTERS) + text[at:]
    if kind == 1:
        return text[:at] + draw.choice(INSERTS) + text[at:]
    if kind == 2:
        return text[:at] + chr(ord(text[at]) ^ 1 << draw.randrange(7)) + text[at + 1 :] if at < len(text) else text[:-1]
    if kind == 3:
        return text[:at]
    number = draw.randrange(len(lines))
    lines[number : number + (kind == 4)] = [] if kind == 4 else [lines[draw.randrange(len(lines))]]
    return "".join(lines)


def bad(seed: str) -> dict[str, str]:
    """Return the files of one experiment, by their names; ``e.yaml`` is the configuration."""
    draw = random.Random(seed)
    data, files = copy.deepcopy(draw.choice(GOOD)), dict(FILES)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        change(data, draw)
    files["e.yaml"] = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    name = draw.choice(["e.yaml"] * 5 + list(FILES))
    for _ in range(draw.choice([0, 0, 1, 2])):
        files[name] = spoil(files[name], draw)
    return files
