"""What a client lets a server ask of it: a configuration is checked before anything that it names is imported or read.

A name must be that of something which gossamer includes, or which the policy lists. Wherever else in a configuration a
text looks like the name of code, or like a path, it is refused, so that an option which is added later, or by a
plug-in, opens no door. The check is made on the configuration as it came: to parse it reads files that it may name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator

from gossamer import registry
from gossamer.errors import PolicyError
from gossamer.options import Options, parse_options
from gossamer.registry.origins import is_within
from gossamer.storage.strict_yaml import read_yaml

NAMES = {  # where a configuration names what is looked up, and the kinds of the registry that it may be of
    "algorithm": ("algorithm",),
    "train.optimizer": ("optimizer",),
    "train.groups.optimizer": ("optimizer",),
    "submodel.strategy": ("strategy",),
    "engine": ("engine",),
    "workload": ("workload",),
    "workload.dataset": ("dataset", "text", "clips"),
    "workload.model": ("model", "text-model", "video-language-model"),
    "clients.partition": ("partition",),
    "clients.sampler": ("sampler",),
    "peers.partition": ("partition",),
    "peers.topology": ("topology",),
}
LISTS = {  # what the lists of a policy limit
    "algorithm": "algorithms",
    "workload": "workloads",
    "workload.dataset": "datasets",
    "workload.model": "models",
}
TEXTS = {  # what is only recorded, or is a pattern of the names of parameters
    *("name", "device.name", "device.source", "devices.profile.name", "devices.profile.source"),
    *("clients.personal", "workload.frozen", "workload.lora.targets", "workload.lora.train", "train.groups.match"),
}
PLACES = {  # paths under other keys than those of `PLACE`
    *("engine.data", "offload.device"),
    *("workload.dataset.videos", "workload.dataset.captions", "workload.dataset.test_captions"),
    *("workload.dataset.classes", "workload.model.weights", "workload.weights"),
}
CODE = re.compile(r"\s*[^\W\d][\w.-]*:[^\W\d][\w.]*\s*")
PLACE = re.compile(
    r"(.*_)?(path|file|folder|directory|dir|root|replay|address|kit|ur[il])s?"
)  # keys of paths and addresses
SUFFIXES: tuple[str, ...] = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".txt", ".xml", ".graphml", ".npy", ".npz")
SUFFIXES += (".parquet", ".safetensors", ".pt", ".pth", ".bin", ".pkl", ".py", ".so", ".zip", ".gz", ".tar")
MAX_DEPTH = 32


class Policy(Options):
    """What a client accepts; what is left out is limited to what gossamer includes.

    Attributes:
        algorithms: names of algorithms; None: all that gossamer includes.
        workloads: names of workloads, likewise.
        datasets: names of data sets, likewise, where the client gives none of its own.
        models: names of models, likewise.
        plug_ins: modules whose code a configuration may name, with all modules below them, such as ``hospital.models``.
            The lists above may name ``module:attribute``, too, which needs no entry here.
        max_epochs: most passes over the client's data in a phase of a round.
        max_steps: most local steps in a phase of a round.
        evaluation: whether models are evaluated on the client's own test data.
        min_test_samples: fewest test samples of which a result is told: a mean over few tells of single ones.
    """

    algorithms: list[str] | None = None
    workloads: list[str] | None = None
    datasets: list[str] | None = None
    models: list[str] | None = None
    plug_ins: list[str] = []
    max_epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    evaluation: bool = True
    min_test_samples: int = Field(default=10, ge=1)

    @field_validator("plug_ins")
    @classmethod
    def _modules(cls, value: list[str]) -> list[str]:
        for module in value:
            top = module.partition(".")[0]
            if not all(part.isidentifier() for part in module.split(".")):
                raise ValueError(f"{module!r} is no module: give names such as hospital.models")
            if top == "gossamer" or top in sys.stdlib_module_names:
                raise ValueError(f"{module!r} is no plug-in, and would open far more: give modules of your own")
        return value

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Read a policy as YAML; None: the default one.

        Raises:
            ConfigError: it is missing or malformed.
        """
        if path is None:
            return cls()
        data = read_yaml(path, "policy")
        return parse_options(cls, {} if data is None else data, path.name)

    def check(self, configuration: Mapping[str, Any], own: Collection[str] = ()) -> None:
        """Refuse what the policy does not accept; nothing is imported or read.

        Args:
            configuration: resolved configuration of one run, as JSON, as the server gave it.
            own: sections that the client replaces by its own, such as ``"workload.dataset"``.

        Raises:
            PolicyError: a setting, and its value, that is not accepted.
        """
        if not isinstance(configuration, Mapping):
            raise PolicyError(f"the configuration is {_shown(configuration)}: give a mapping of keys to values")
        for key in ("methods", "seeds"):
            if configuration.get(key) is not None:
                value = _shown(configuration[key])
                raise PolicyError(f"the policy refuses {key} = {value}: a client trains in one run at a time")
        for key in NAMES:
            if key not in own:
                for value in _entries(configuration, key):
                    self._check_name(key, value)
        for key, value in _leaves(configuration, own):
            self._check_leaf(key, value)
        self._check_work(configuration)

    def check_steps(self, steps: int, step_size: int, num_samples: int) -> None:
        """Refuse a job of more local steps than the policy accepts.

        Args:
            steps: local steps.
            step_size: samples of a step.
            num_samples: samples that the client holds.

        Raises:
            PolicyError: there are more.
        """
        if self.max_steps is not None and steps > self.max_steps:
            raise PolicyError(f"a job asks for {steps} steps, but the policy accepts max_steps = {self.max_steps}")
        epoch = -(-num_samples // step_size)
        if self.max_epochs is not None and steps > self.max_epochs * epoch:
            raise PolicyError(
                f"a job asks for {steps} steps, of which {epoch} are an epoch, but the policy accepts max_epochs ="
                f" {self.max_epochs}"
            )

    def check_evaluation(self, num_samples: int | None = None) -> None:
        """Refuse to tell how good a model is.

        Args:
            num_samples: test samples; None: they are not known yet, or not counted.

        Raises:
            PolicyError: the policy does not accept it.
        """
        if not self.evaluation:
            raise PolicyError("the server asks for an evaluation, but the policy accepts evaluation = False")
        if num_samples is not None and num_samples < self.min_test_samples:
            raise PolicyError(
                f"the server asks for an evaluation, but there are {num_samples} test samples, and the policy accepts"
                f" min_test_samples = {self.min_test_samples}"
            )

    def enforced(self, own: Collection[str] = ()) -> AbstractContextManager[None]:
        """Return a context in which this thread imports no plug-in that the policy does not list.

        Args:
            own: names ``module:attribute`` of the client's own choice, which may be imported, too.
        """
        listed = [*own, *(name for option in LISTS.values() for name in vars(self)[option] or ())]
        return registry.only({*self.plug_ins, *(name.partition(":")[0] for name in listed if ":" in name)})

    def _check_name(self, key: str, value: Any) -> None:
        """Refuse a name of code that is neither included nor listed."""
        name = value.get("name") if isinstance(value, Mapping) else value
        option = LISTS.get(key, "")
        accepted: list[str] | None = vars(self)[option] if option else None
        if name is None and accepted is None:
            return
        if not isinstance(name, str):
            raise PolicyError(f"the policy refuses {key} = {_shown(value)}: it must have a name")
        if accepted is not None:
            if name not in accepted:
                raise PolicyError(f"the policy refuses {key} = {_shown(name)}: {option} accepts {accepted}")
            return
        kinds = NAMES[key]
        if not any(registry.is_builtin(kind, name) for kind in kinds):
            modules = {registry.module_of(kind, name) for kind in kinds} - {None}
            self._require_listed(key, name, modules)

    def _check_leaf(self, key: str, value: Any) -> None:
        """Refuse what looks like the name of code, a path or an address."""
        is_place = key in PLACES or any(PLACE.fullmatch(part.lower()) for part in key.split("."))
        if value is None or key in TEXTS or key.removesuffix(".name") in NAMES:
            return
        if isinstance(value, str) and CODE.fullmatch(value) and not is_place:
            self._require_listed(key, value, {value.strip().partition(":")[0]})
        elif is_place or (isinstance(value, str) and is_path(value)):
            raise PolicyError(
                f"the policy refuses {key} = {_shown(value)}: a server may name no files, folders or addresses"
            )

    def _require_listed(self, key: str, name: str, modules: Collection[str | None]) -> None:
        if not modules or not all(module and is_within(module, self.plug_ins) for module in modules):
            raise PolicyError(
                f"the policy refuses {key} = {_shown(name)}, which gossamer does not include: plug_ins accepts"
                f" {self.plug_ins}"
            )

    def _check_work(self, configuration: Mapping[str, Any]) -> None:
        """Refuse more work than the policy accepts."""
        limits = {
            "train.epochs": ("max_epochs", self.max_epochs),
            "train.steps": ("max_steps", self.max_steps),
            "evaluation.fine_tune_steps": ("max_steps", self.max_steps),
        }
        for key, (option, limit) in limits.items():
            value = _entry(configuration, key)
            if limit is None or value is None:
                continue
            if not isinstance(value, int):
                raise PolicyError(f"the policy refuses {key} = {_shown(value)}: it must be a whole number")
            if value > limit:
                raise PolicyError(f"the policy refuses {key} = {value}: it accepts {option} = {limit}")


def is_path(text: str) -> bool:
    """Say whether a text looks like the path of a file or a folder, or like an address."""
    return bool(set(text) & set("/\\\0")) or text[:1] == "~" or text in (".", "..") or text.lower().endswith(SUFFIXES)


def _entry(configuration: Mapping[str, Any], key: str) -> Any:
    """Return what stands at a dotted key; None where nothing does."""
    found: Any = configuration
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _entries(configuration: Mapping[str, Any], key: str) -> list[Any]:
    """Return what stands at a dotted key, of each entry of the lists on the way."""
    found: list[Any] = [configuration]
    for part in key.split("."):
        below = [one for each in found for one in (each if isinstance(each, list | tuple) else [each])]
        found = [one.get(part) if isinstance(one, Mapping) else None for one in below]
    return found


def _leaves(value: Any, own: Collection[str], key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key of every plain value, and the value; entries of lists have the key of their list."""
    if depth > MAX_DEPTH:
        raise PolicyError(f"the policy refuses {_shown(key)}, which is nested deeper than {MAX_DEPTH} levels")
    if key in own:
        return
    if isinstance(value, Mapping):
        for name, below in value.items():
            part = repr(name) if "." in str(name) else str(name)  # so that it is no two keys
            yield from _leaves(below, own, f"{key}.{part}" if key else part, depth + 1)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _leaves(below, own, key, depth + 1)
    else:
        yield key, value


def _shown(value: Any) -> str:
    """Return a value that a stranger gave, not too long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
