"""What the names in a configuration stand for, from docstrings and options: ``gossamer describe``, docs/reference.md.

Nothing is listed here by hand: kinds and names are those of the registry, and what has an `Options` model, a docstring
and a source is described by them. The few kinds that are no plug-ins stand in `more_kinds`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import BaseModel

from gossamer import registry
from gossamer.aggregate.codecs import CODECS
from gossamer.algorithms.traits import AlgorithmTraits
from gossamer.config.schema import Config
from gossamer.errors import RegistryError, nearest
from gossamer.reports.log_names import EVENTS, METRICS
from gossamer.reports.option_docs import Option, attributes, default_text, inner_model, options_of, type_name
from gossamer.simulation.devices import profile_names, read_profile
from gossamer.submodel.strategies import Strategy
from gossamer.topology.family import Family

GENERAL = "general"  # the section of the keys that stand at the top of a configuration
KEYS = {
    "algorithm": "algorithm",
    "optimizer": "train.optimizer",
    "strategy": "submodel.strategy",
    "engine": "engine.name",
    "workload": "workload.name",
    "dataset": "workload.dataset, of images",
    "text": "workload.dataset, of next-character",
    "model": "workload.model, of images and other samples",
    "text-model": "workload.model, of next-character",
    "partition": "clients.partition or peers.partition",
    "topology": "peers.topology",
    "sampler": "clients.sampler",
    "codec": "algorithm.compressor of peers; communication.uplink and communication.downlink",
    "device": "device, or profile in devices",
}
CITATION = re.compile(r"\(([^()]*(?:arXiv|\b(?:19|20)\d\d\b)[^()]*)\)")
SOURCE = re.compile(r"Source: (.+?)(?:\.\s|\.?$)", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """What one name stands for.

    Attributes:
        kind, name: of the plug-in, metric, event or section of a configuration.
        about: first paragraph of its docstring.
        source: publication; "" where there is none.
        facts: ``{what: value}``, such as the degree of a topology.
        options: its options; an empty tuple where it takes none.
    """

    kind: str
    name: str
    about: str
    source: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    options: tuple[Option, ...] = ()


def kinds() -> list[str]:
    """List all kinds of names, those of the registry first."""
    return [*registry.BUILTIN, *(kind for kind in more_kinds() if kind not in registry.BUILTIN)]


@cache
def more_kinds() -> dict[str, dict[str, Callable[[str], Entry]]]:
    """Return ``{kind: {name: what makes its entry}}`` of what is no plug-in."""
    codecs = {name: (lambda name: of_object("codec", name, CODECS[name])) for name in CODECS}
    return {
        "codec": codecs,
        "device": dict.fromkeys(profile_names(), _device),
        "metric": {name: (lambda name: Entry("metric", name, METRICS[name])) for name in METRICS},
        "event": {name: (lambda name: Entry("event", name, EVENTS[name])) for name in EVENTS},
        "config": dict.fromkeys(sections(), section),
    }


def names(kind: str) -> list[str]:
    """List the names of a kind.

    Raises:
        RegistryError: there is no such kind.
    """
    if kind in registry.BUILTIN:
        return [*registry.BUILTIN[kind], *(name for name in registry.names(kind) if name not in registry.BUILTIN[kind])]
    if kind in more_kinds():
        return list(more_kinds()[kind])
    holders = [one for one in kinds() if kind in names(one)]
    if holders:
        raise RegistryError(
            f"{kind!r} is no kind of names, but a name of kind {holders[0]!r}: gossamer describe {holders[0]} {kind}"
        )
    raise RegistryError(f"unknown kind {kind!r}{nearest(kind, kinds())} (known: {', '.join(kinds())})")


def entry(kind: str, name: str) -> Entry:
    """Describe what a name, or ``module:attribute``, stands for.

    Raises:
        RegistryError: the kind or the name is unknown.
    """
    known = names(kind)
    if kind in registry.BUILTIN:
        return of_object(kind, name, registry.resolve(kind, name))
    if name not in known:
        raise RegistryError(f"unknown {kind} {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return more_kinds()[kind][name](name)


def of_object(kind: str, name: str, found: Any) -> Entry:
    """Describe a plug-in by its docstring, its `Options` and whatever else it says of itself."""
    doc, model = documentation(found), options_model(found)
    options = options_of(model) if model is not None else _parameters(found)
    return Entry(kind, name, paragraph(doc), _source(found, doc), _facts(found), options)


def documentation(found: Any) -> str:
    """Return the docstring of a class or a function, or what an object says of itself in `about`."""
    if isinstance(found, type) or inspect.isroutine(found):
        return inspect.getdoc(found) or ""
    if isinstance(found, Family | Strategy):
        maker = found.make if isinstance(found, Family) else found.choose
        return found.about or inspect.getdoc(maker) or ""
    return inspect.getdoc(type(found)) or ""


def options_model(found: Any) -> type[BaseModel] | None:
    """Return the model of a plug-in's options; None where it states none."""
    if isinstance(found, type) and issubclass(found, BaseModel):
        return found
    if isinstance(found, Family):
        return found.options
    model = found.Options if hasattr(found, "Options") else None
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def paragraph(doc: str) -> str:
    """Return the first paragraph of a docstring as one line."""
    return re.sub(r"::$", ".", " ".join(doc.split("\n\n")[0].split()))


def sections() -> dict[str, type[BaseModel]]:
    """Return ``{section: model}`` of a configuration; `GENERAL` has the keys that are no section."""
    inner = {name: inner_model(info.annotation) for name, info in Config.model_fields.items()}
    return {GENERAL: Config, **{name: model for name, model in inner.items() if model is not None}}


def section(name: str) -> Entry:
    """Describe a section of a configuration."""
    model = sections()[name]
    prefix = "" if name == GENERAL else f"{name}."
    options = tuple(
        one for one in options_of(model, prefix) if name != GENERAL or one.name.partition(".")[0] not in sections()
    )
    return Entry("config", name, paragraph(inspect.getdoc(model) or ""), options=options)


def _device(name: str) -> Entry:
    profile = read_profile(name)
    facts = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in profile.items()}
    return Entry("device", name, f"Profile of a device, {facts.pop('name')}.", facts.pop("source"), facts)


def _parameters(found: Any) -> tuple[Option, ...]:
    """Return the parameters with a default of a function, or of a class that states no options."""
    if not callable(found) or isinstance(found, Family | Strategy):
        return ()
    try:
        signature = inspect.signature(found)
    except ValueError:  # some built-in types have none
        return ()
    docs = attributes(inspect.getdoc(found) or "")
    return tuple(
        Option(one.name, type_name(one.annotation), default_text(one.default), False, docs.get(one.name, ""))
        for one in signature.parameters.values()
        if one.default is not one.empty
    )


def _source(found: Any, doc: str) -> str:
    """Return the publications that a docstring cites, or else those of the class that it is derived from."""
    if isinstance(found, Family):
        return found.source
    parents = [inspect.cleandoc(one.__doc__ or "") for one in found.__mro__] if isinstance(found, type) else [doc]
    for text in parents:
        cited = [*SOURCE.findall(text), *CITATION.findall(text)]
        if cited:
            return "; ".join(dict.fromkeys(" ".join(one.split()) for one in cited))
    return ""


def _facts(found: Any) -> dict[str, str]:
    if isinstance(found, Family):
        return {
            "rounds": {"static": "all alike", "periodic": "repeat", "random": "drawn anew"}[found.kind],
            "degree": found.degree,
            "consensus rate": found.rate,
            "minimum n": str(found.minimum),
        }
    if isinstance(found, Strategy):
        ignored = {"has no effect": " and ".join(found.unused)} if found.unused else {}
        return {"windows of a round": "the same for all of a capacity" if found.shared else "of each client"} | ignored
    traits = found.traits if hasattr(found, "traits") else None
    if not isinstance(traits, AlgorithmTraits):
        return {}
    reason = traits.whole_models_only
    return {
        "for": "peers on a topology" if traits.downlink is None else "clients of a server",
        "sub-models": "yes" if reason is None else f"no, because {reason}",
    }
