"""A client's policy against a curious server: no code, no file, no address and no more work than the client accepts."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import gossamer
from fuzz.configurations import FILES, GOOD, paths
from gossamer import registry
from gossamer.config import loading
from gossamer.config.plugins import Plugin
from gossamer.config.resolve import resolve
from gossamer.config.schema import Config
from gossamer.errors import ConfigError, PolicyError, RegistryError
from gossamer.reports.describe import options_model
from gossamer.transport.policy import LISTS, NAMES, PLACE, PLACES, TEXTS, Policy, is_path

SOURCE = Path(gossamer.__file__).parent
EVIL = "import os, pathlib\npathlib.Path(os.environ['MARKER']).write_text('imported')\nclass Thing: ...\n"


def texts(value: Any) -> Iterator[str]:
    """Every text below a value."""
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(one)
    if isinstance(value, str):
        yield value


@cache
def resolved(number: int = 1) -> str:
    """A small configuration, as a server would send it; number 1 has clients of two capacities."""
    _, single = next(iter(loading.expand(GOOD[number]).items()))
    return json.dumps(resolve(loading.parse(single)).config.model_dump(mode="json"))


def sent(number: int = 1, **changes: Any) -> dict[str, Any]:
    """Such a configuration in which dotted keys, with __ for a dot, are replaced."""
    found: dict[str, Any] = json.loads(resolved(number))
    for key, value in changes.items():
        found = loading.with_value(found, key.split("__"), copy.deepcopy(value))
    return found


class TestWhatIsAccepted:
    @pytest.mark.parametrize("number", [n for n, one in enumerate(GOOD) if not set(FILES) & set(texts(one))])
    def test_configurations_of_what_gossamer_includes(self, number: int) -> None:
        Policy().check(sent(number))

    @pytest.mark.parametrize("name", ["quickstart", "fedrolex-mnist", "equitopo-mnist", "shakespeare-roles", "diloco"])
    def test_those_of_the_experiments(self, name: str) -> None:
        file = SOURCE.parents[1] / "experiments" / name / "config.yaml"
        for single in list(loading.expand(loading.load(file)).values())[:2]:
            Policy().check(resolve(loading.parse(single)).config.model_dump(mode="json"))

    def test_a_section_without_a_name(self) -> None:
        Policy().check(sent(engine={"modes": []}, algorithm=None))

    def test_what_the_client_replaces(self) -> None:
        theirs = sent(workload__dataset={"name": "table", "path": "/srv/data.csv"})
        Policy().check(theirs, own=["workload.dataset"])
        with pytest.raises(PolicyError, match=r"workload.dataset.path = '/srv/data.csv'"):
            Policy().check(theirs)


CURIOUS: list[tuple[dict[str, Any], str]] = [
    *(
        ({key.replace(".", "__"): "evil_plug_in:Thing"}, key)
        for key in NAMES
        if not key.startswith(("peers", "train.groups"))
    ),
    ({"train__groups": [{"match": "*", "optimizer": "evil_plug_in:Thing"}]}, "train.groups.optimizer"),
    ({"train__groups": [{"match": "*", "optimizer": {"name": "a_name_of_nothing"}}]}, "train.groups.optimizer"),
    *(({key.replace(".", "__"): {"name": "evil_plug_in:Thing"}}, key) for key in LISTS),
    ({"workload__model": "torch.nn:Linear"}, "workload.model"),
    ({"workload__model": "gossamer.task:task_of"}, "workload.model"),
    ({"workload__model": "object:mine"}, "workload.model"),
    ({"workload__model": "a_short_name_of_nothing"}, "workload.model"),
    ({"workload__model": ["evil_plug_in:Thing"]}, "workload.model"),
    ({"workload__model": {"name": {"name": "mlp"}}}, "workload.model"),
    ({"workload__model": {"name": "mlp", "activation": "evil_plug_in:Thing"}}, "workload.model.activation"),
    ({"workload__model": {"name": "mlp", "layers": [{"of": " evil_plug_in:Thing "}]}}, "workload.model.layers.of"),
    (
        {"workload": {"name": "image-classification", "workload.model": "evil_plug_in:Thing"}},
        "workload.'workload.model'",
    ),
    ({"workload.model": "evil_plug_in:Thing"}, "'workload.model'"),
    ({"clients__partition": {"name": "iid", "of": ["x", "evil_plug_in:Thing"]}}, "clients.partition.of"),
    ({"algorithm": {"name": "fedavg", "outer": {"name": "evil_plug_in:Thing"}}}, "algorithm.outer.name"),
    ({"log": {"sinks": ["evil_plug_in:Thing"]}}, "log.sinks"),
    ({"workload__dataset": {"name": "table", "path": "passwords"}}, "workload.dataset.path"),
    ({"workload__dataset": {"name": "table", "test_path": "/etc/passwd", "path": None}}, "workload.dataset.test_path"),
    ({"workload__dataset": {"name": "digits", "root": {"of": 7}}}, "workload.dataset.root.of"),
    ({"workload__dataset": {"name": "captioned-videos", "videos": "private"}}, "workload.dataset.videos"),
    ({"workload__dataset": {"name": "captioned-videos", "captions": "notes"}}, "workload.dataset.captions"),
    ({"clients__partition": {"name": "file", "path": "/etc/passwd"}}, "clients.partition.path"),
    ({"workload__model": {"name": "mlp", "weights": "/etc/passwd"}}, "workload.model.weights"),
    ({"workload__model": {"name": "mlp", "weights": "~/.ssh/id"}}, "workload.model.weights"),
    ({"workload__model": {"name": "mlp", "weights": "model.pt"}}, "workload.model.weights"),
    ({"workload__model": {"name": "vit", "weights": "secrets"}}, "workload.model.weights"),
    ({"workload": {"name": "video-language", "weights": "secrets"}}, "workload.weights"),
    ({"workload__encoders": {"image": "evil_plug_in:Thing"}}, "workload.encoders.image"),
    (
        {"workload__architectures": {"a": {"share": 1, "encoders": {"image": "evil_plug_in:Thing"}}}},
        "workload.architectures.a.encoders.image",
    ),
    ({"device": "/etc/passwd"}, "device"),
    ({"device": "profile.yaml"}, "device"),
    ({"devices": [{"profile": "../profile.yaml"}]}, "devices.profile"),
    ({"engine__address": "ray://evil.example.org:10001"}, "engine.address"),
    ({"engine__address": "auto"}, "engine.address"),
    ({"methods": {"a": {"algorithm": "evil_plug_in:Thing"}}}, "methods"),
    ({"seeds": [0, 1]}, "seeds"),
]


@pytest.mark.parametrize(("changes", "key"), CURIOUS)
def test_a_curious_server_is_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy().check(sent(**changes))
    assert f"the policy refuses {key} = " in str(caught.value)


@pytest.mark.parametrize("number", [1, 4])
def test_every_entry_is_watched(number: int) -> None:
    """Whatever is replaced by code, a path or an address is refused, but for text of which only a record is made."""
    for path in paths(sent(number)):
        key = ".".join(part for part in path if isinstance(part, str))
        for value in ("evil_plug_in:Thing", "evil-plug.in:Thing", "/etc/passwd", {"path": "passwords"}, [{"url": 1}]):
            changed: Any = sent(number)
            parent = changed
            for part in path[:-1]:
                parent = parent[part]
            parent[path[-1]] = value
            if key in TEXTS and isinstance(value, str):
                Policy().check(changed)
            else:
                with pytest.raises(PolicyError):
                    Policy().check(changed)


def test_peers_are_checked_too() -> None:
    for topology in ("evil_plug_in:Thing", "graph.txt", "graph", {"name": "file", "path": "graph"}):
        with pytest.raises(PolicyError, match=r"peers.topology"):
            Policy().check(sent(4, peers__topology=topology))
    with pytest.raises(PolicyError, match=r"peers.partition"):
        Policy().check(sent(4, peers__partition="evil_plug_in:Thing"))


@pytest.mark.parametrize("value", [None, [], "text", 7])
def test_what_is_no_configuration(value: Any) -> None:
    with pytest.raises(PolicyError, match="give a mapping"):
        Policy().check(value)


def test_nesting_is_bounded() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = {"a": [deep]}
    with pytest.raises(PolicyError, match="nested deeper than 32 levels"):
        Policy().check(sent() | {"log": deep})


WATCHED = """
import json, sys
from gossamer.errors import PolicyError
from gossamer.transport.policy import Policy

first, *cases = json.loads(sys.stdin.read())
policy, events, refused = Policy(), [], 0
policy.check(first)
sys.addaudithook(lambda event, args: events.append(str(args[0])) if event in ("import", "open", "os.listdir") else None)
for case in cases:
    try:
        policy.check(case)
    except PolicyError:
        refused += 1
try:
    import a_module_that_is_not_there
except ImportError:
    print(json.dumps([refused, events]))
"""


def test_nothing_is_imported_or_read_while_it_is_refused(tmp_path: Path) -> None:
    """An audit hook of Python's sees every import and every file that is opened."""
    (tmp_path / "evil_plug_in.py").write_text(EVIL)
    cases = [sent(), *(sent(**changes) for changes, _ in CURIOUS)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{SOURCE.parent}:{tmp_path}", "MARKER": str(tmp_path / "marker")},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    refused, events = json.loads(done.stdout)
    assert refused == len(CURIOUS)
    assert "a_module_that_is_not_there" in events  # the hook works
    touched = [event for event in events if "evil" in event or "passw" in event or "profile" in event]
    assert touched == []
    assert not (tmp_path / "marker").exists()


class TestLists:
    POLICY = Policy(
        algorithms=["fedavg", "fedrolex"], models=["mlp", "hospital.models:Net"], plug_ins=["hospital.data"]
    )

    def test_accepted(self) -> None:
        self.POLICY.check(sent())
        self.POLICY.check(sent(workload__model={"name": "hospital.models:Net", "width": 0.5}))
        self.POLICY.check(sent(workload__dataset="hospital.data:scans"))
        self.POLICY.check(sent(workload__dataset="hospital.data.mri:scans"))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"algorithm": "fedprox"}, r"algorithm = 'fedprox': algorithms accepts \['fedavg', 'fedrolex'\]"),
            ({"algorithm": None}, r"algorithm = None: it must have a name"),
            ({"workload__model": "cnn"}, r"workload.model = 'cnn': models accepts"),
            ({"workload__model": None}, r"workload.model = None: it must have a name"),
            ({"workload__model": "hospital.models:Other"}, r"workload.model = 'hospital.models:Other': models accepts"),
            (
                {"workload__dataset": "hospital.database:all"},
                r"workload.dataset = 'hospital.database:all', which gossamer",
            ),
            ({"workload__dataset": "hospital:data"}, r"workload.dataset = 'hospital:data', which gossamer"),
        ],
    )
    def test_refused(self, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(PolicyError, match=sentence):
            self.POLICY.check(sent(**changes))

    def test_work(self) -> None:
        policy = Policy(max_epochs=2, max_steps=50)
        policy.check(sent(train__epochs=2))
        policy.check(sent(train__epochs=None, train__steps=50))
        for changes, sentence in (
            ({"train__epochs": 3}, "train.epochs = 3: it accepts max_epochs = 2"),
            ({"train__epochs": "3"}, "train.epochs = '3': it must be a whole number"),
            ({"train__epochs": None, "train__steps": 51}, "train.steps = 51: it accepts max_steps = 50"),
            ({"evaluation__fine_tune_steps": 51}, "evaluation.fine_tune_steps = 51: it accepts max_steps = 50"),
        ):
            with pytest.raises(PolicyError, match=sentence):
                policy.check(sent(**changes))

    def test_work_of_a_job(self) -> None:
        policy = Policy(max_epochs=2, max_steps=50)
        policy.check_steps(50, step_size=10, num_samples=1000)
        policy.check_steps(4, step_size=10, num_samples=11)
        with pytest.raises(PolicyError, match="asks for 51 steps, but the policy accepts max_steps = 50"):
            policy.check_steps(51, step_size=10, num_samples=1000)
        with pytest.raises(PolicyError, match="asks for 5 steps, of which 2 are an epoch"):
            policy.check_steps(5, step_size=10, num_samples=11)
        Policy().check_steps(10**9, step_size=1, num_samples=1)


class TestFiles:
    def test_read(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.yaml"
        path.write_text("algorithms: [fedavg]\nplug_ins: [hospital.models]\nmax_epochs: 5\n")
        assert Policy.load(path) == Policy(algorithms=["fedavg"], plug_ins=["hospital.models"], max_epochs=5)
        path.write_text("")
        assert Policy.load(path) == Policy.load(None) == Policy()

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("algorithm: [fedavg]", r"unknown key 'policy.yaml.algorithm'; did you mean 'algorithms'\?"),
            ("algorithms: fedavg", r"policy.yaml.algorithms = 'fedavg'"),
            ("max_epochs: 0", r"policy.yaml.max_epochs = 0"),
            ("plug_ins: [gossamer]", r"'gossamer' is no plug-in, and would open far more"),
            ("plug_ins: [os.path]", r"'os.path' is no plug-in"),
            ("plug_ins: ['hospital:models']", r"'hospital:models' is no module"),
            ("- a", r"must be a mapping"),
        ],
    )
    def test_bad_ones(self, tmp_path: Path, text: str, sentence: str) -> None:
        path = tmp_path / "policy.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            Policy.load(path)


class TestEnforced:
    """What the check might miss, the registry refuses when it is looked up."""

    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Put a module of a stranger where it would be found."""
        (tmp_path / "evil_plug_in.py").write_text(EVIL + "from subprocess import call\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
        self.marker = tmp_path / "marker"
        yield
        sys.modules.pop("evil_plug_in", None)

    def test_nothing_is_imported(self) -> None:
        with Policy().enforced(), registry.trusting(), pytest.raises(RegistryError, match="policy here does not list"):
            registry.resolve("model", "evil_plug_in:Thing")
        assert not self.marker.exists()
        registry.resolve("model", "evil_plug_in:Thing")  # as anybody may who has no policy
        assert self.marker.exists()

    def test_what_is_listed_is(self) -> None:
        with Policy(models=["evil_plug_in:Thing"]).enforced():
            assert registry.resolve("model", "evil_plug_in:Thing").__name__ == "Thing"
            assert registry.resolve("model", "mlp").__name__ == "MLP"

    def test_it_counts_where_a_function_is_defined(self) -> None:
        with Policy(plug_ins=["evil_plug_in"]).enforced(), pytest.raises(RegistryError, match="code in 'subprocess'"):
            registry.resolve("model", "evil_plug_in:call")


# What a configuration may say as free text besides names, records, patterns, paths and addresses.
OTHERS = {
    "engine.device": "torch's name of a device",
    "offload.engine": "name of an engine of a device",
    "engine.modes.device": "torch's name of a device",
    "engine.modes.holding": "name of a set of modules",
    "log.sinks": "one of three names; a client has no trackers",
    "communication.uplink": "a codec, of a fixed list",
    "communication.downlink": "a codec, of a fixed list",
    "algorithm.compressor": "a codec, of a fixed list",
    "submodel.offsets": "numbers by the name of an axis",
    "methods": "refused",
    "stop.metric": "name of a metric",
    "algorithm.metric": "name of a metric",
    "peers.topology.graph": "a graph given in Python; JSON has none",
    "workload.dataset.label": "name of a column",
    "workload.dataset.sample": "name of a column",
    "workload.model.lora.targets": "patterns of the names of layers",
    "workload.encoders": "models by modality, whose names are refused where they are code",
    "workload.server_encoders": "likewise",
    "workload.architectures": "likewise, by names of architectures",
    "workload.architectures.encoders": "likewise",
    "workload.shapes": "shares of clients by names of sizes",
    "workload.tasks": "names of tasks of the model",
    "workload.client_tasks": "shares by names of tasks",
    "workload.task_weights": "numbers by names of tasks",
    "workload.without": "names of modalities",
    "workload.evaluate": "names of tasks of the model",
    "workload.modalities": "shares by names of modalities",
    "workload.missing.train": "rates by names of modalities",
    "workload.missing.test": "rates by names of modalities",
    "workload.labels.missing": "rates by names of labels",
    "workload.labels.wrong": "rates by names of labels",
    "workload.partition_label": "name of a label",
}


def free_texts(model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Yield the dotted key of every option that takes text of any kind, or anything."""
    for name, field in model.model_fields.items():
        key = f"{where}.{name}" if where else name
        members = list(parts(field.annotation))
        inner = [one for one in members if isinstance(one, type) and issubclass(one, BaseModel)]
        for one in inner:
            yield from free_texts(one, key)
        if {str, Path, Any} & set(members):
            yield key


def parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all types within it, but for the values of a Literal."""
    yield annotation
    if typing.get_origin(annotation) is not typing.Literal:
        for part in get_args(annotation):
            yield from parts(part)


def is_known(key: str) -> bool:
    """Say whether the policy, or this file, says what an option is."""
    return (
        key in NAMES or key in TEXTS or key in PLACES or key in OTHERS or bool(PLACE.fullmatch(key.rpartition(".")[2]))
    )


class TestNothingIsForgotten:
    def test_options_of_the_configuration(self) -> None:
        found = set(free_texts(Config))
        assert {"engine.name", "device.source", "clients.sampler", "engine.address"} <= found
        assert {key for key in found if not is_known(key) and key.removesuffix(".name") not in NAMES} == set()

    def test_options_of_what_is_included(self) -> None:
        wheres = {kind: key for key, kinds in NAMES.items() for kind in kinds}
        found = set[str]()
        for kind in registry.BUILTIN:
            for name in registry.BUILTIN[kind]:
                if (model := options_model(registry.resolve(kind, name))) is not None:
                    found |= set(free_texts(model, wheres[kind]))
        assert {"workload.dataset.path", "workload.model", "workload.lora.targets"} <= found
        assert {key for key in found if not is_known(key)} == set()

    def test_kinds_of_names(self) -> None:
        assert {kind for kinds in NAMES.values() for kind in kinds} == set(registry.BUILTIN)

    def test_sections_that_name_plug_ins(self) -> None:
        """Every field that is a `Plugin`, or has a list of its own in a policy, is among the names."""

        def plug_ins(model: type[BaseModel], where: str = "") -> Iterator[str]:
            for name, field in model.model_fields.items():
                key = f"{where}.{name}" if where else name
                if field.annotation == dict[str, Any] and field.metadata:
                    yield key
                for one in parts(field.annotation):
                    if isinstance(one, type) and issubclass(one, BaseModel):
                        yield from plug_ins(one, key)

        assert get_args(Plugin)[0] == dict[str, Any]
        found = set(plug_ins(Config))
        assert {"workload", "clients.partition", "peers.topology", "train.optimizer"} <= found
        assert found - set(NAMES) == {"communication.uplink", "communication.downlink"}
        assert set(LISTS) <= set(NAMES)

    def test_where_the_source_looks_names_up(self) -> None:
        """Every file that imports by name; what is looked up in another one has to be thought of in the policy."""
        found: dict[str, set[str]] = {}
        for path in sorted(SOURCE.rglob("*.py")):
            for name in LOOKUP.findall(path.read_text(encoding="utf-8")):
                found.setdefault(str(path.relative_to(SOURCE)), set()).add(name)
        assert found == LOOKUPS


LOOKUP = re.compile(
    r"(?<![\w.`])(?:importlib\.|registry\.)?(import_module|__import__|load_object|import_optional|exec|eval"
    r"|resolve_function|plug_in|resolve(?=\((?:kind|\")))\("
)
LOOKUPS = {
    "__init__.py": {"import_module"},
    "algorithms/checks.py": {"resolve"},
    "build.py": {"resolve_function"},
    "config/optimizers.py": {"resolve"},
    "config/resolve.py": {"resolve", "resolve_function"},
    "distributed/methods.py": {"resolve"},
    "engines/ray/cluster.py": {"load_object"},
    "engines/ray/tasks.py": {"load_object"},
    "engines/recipe.py": {"load_object"},
    "registry/__init__.py": {"import_module", "import_optional", "load_object", "resolve", "resolve_function"},
    "reports/describe.py": {"resolve"},
    "storage/sinks.py": {"import_optional"},
    "submodel/strategies.py": {"resolve"},
    "topology/report.py": {"resolve"},
    "topology/topology.py": {"resolve"},
    "transport/__init__.py": {"import_module"},
    "workloads/base.py": {"resolve_function"},
    "workloads/multimodal/encoders.py": {"plug_in"},
    "workloads/multimodal/workload.py": {"plug_in"},
    "workloads/partitions.py": {"plug_in"},
    "workloads/plugins.py": {"plug_in", "resolve_function"},
    "workloads/supervised.py": {"plug_in"},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in ("/", "a/b", "a\\b", "~x", ".", "..", "x.YAML", "a.csv", "http://x", "a\0b")),
        *((text, False) for text in ("fedavg", "head.*", "cuda:0", "1e-3", "", "a.b", "x y", "\u00fc")),
    ],
)
def test_what_looks_like_a_path(text: str, expected: bool) -> None:
    assert is_path(text) == expected
