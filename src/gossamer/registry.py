"""Look-up of plug-ins by a short name, ``module:attribute``, or an entry point.

`BUILTIN` has the short names of what is included; a package of your own adds names under the entry-point group
``gossamer.<kind>``, or is named in full as ``my_package.my_module:MyThing``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from gossamer.errors import ConfigError, RegistryError, nearest, plugin_errors

BUILTIN: dict[str, dict[str, str]] = {
    "algorithm": {
        "fedavg": "gossamer.algorithms.federated:FedAvg",
        "fedrolex": "gossamer.algorithms.federated:FedRolex",
        "heterofl": "gossamer.algorithms.federated:HeteroFL",
        "federated-dropout": "gossamer.algorithms.federated:FederatedDropout",
        "fjord": "gossamer.algorithms.fjord:FjORD",
        "fiarse": "gossamer.algorithms.fiarse:FIARSE",
        "fedprox": "gossamer.algorithms.fedprox:FedProx",
        "scaffold": "gossamer.algorithms.scaffold:Scaffold",
        "fednova": "gossamer.algorithms.fednova:FedNova",
        "fedadam": "gossamer.algorithms.fedopt:FedAdam",
        "fedyogi": "gossamer.algorithms.fedopt:FedYogi",
        "fedadagrad": "gossamer.algorithms.fedopt:FedAdagrad",
        "all-smallest": "gossamer.algorithms.federated:AllSmallest",
        "all-largest": "gossamer.algorithms.federated:AllLargest",
        "dsgd": "gossamer.algorithms.decentralized.dsgd:DSGD",
        "gossip-pga": "gossamer.algorithms.decentralized.dsgd:GossipPGA",
        "quasi-global-momentum": "gossamer.algorithms.decentralized.dsgd:QuasiGlobalMomentum",
        "dsgt": "gossamer.algorithms.decentralized.tracking:DSGT",
        "d2": "gossamer.algorithms.decentralized.diffusion:D2",
        "exact-diffusion": "gossamer.algorithms.decentralized.diffusion:ExactDiffusion",
        "push-sum": "gossamer.algorithms.decentralized.pushsum:StochasticGradientPush",
        "choco-sgd": "gossamer.algorithms.decentralized.choco:ChocoSGD",
        "dsgd-ceca": "gossamer.algorithms.decentralized.ceca:DSGDCECA",
    },
    "strategy": {
        "rolling": "gossamer.submodel.strategies:rolling",
        "static": "gossamer.submodel.strategies:static",
        "random": "gossamer.submodel.strategies:random",
        "covering": "gossamer.submodel.covering:covering",
        "magnitude": "gossamer.submodel.magnitude:magnitude",
    },
    "engine": {"local": "gossamer.engines.local.engine:LocalEngine", "ray": "gossamer.engines.ray.engine:RayEngine"},
    "workload": {
        "image-classification": "gossamer.workloads.images:ImageClassification",
        "next-character": "gossamer.workloads.text:NextCharacter",
        "least-squares": "gossamer.workloads.convex:LeastSquares",
        "logistic-regression": "gossamer.workloads.convex:LogisticRegression",
        "consensus": "gossamer.workloads.consensus:Consensus",
    },
    "dataset": {
        "digits": "gossamer.workloads.datasets:digits",
        "mnist": "gossamer.workloads.datasets:mnist",
        "fashion-mnist": "gossamer.workloads.datasets:fashion_mnist",
        "cifar10": "gossamer.workloads.datasets:cifar10",
        "cifar100": "gossamer.workloads.datasets:cifar100",
        "synthetic": "gossamer.workloads.datasets:synthetic",
        "spoken-digits": "gossamer.workloads.spoken:spoken_digits",
    },
    "text": {
        "shakespeare": "gossamer.workloads.texts:shakespeare",
        "synthetic": "gossamer.workloads.texts:synthetic",
    },
    "model": {
        "softmax": "gossamer.workloads.models:Softmax",
        "mlp": "gossamer.workloads.models:MLP",
        "cnn": "gossamer.workloads.models:CNN",
        "preact-resnet18": "gossamer.workloads.resnet:PreActResNet18",
    },
    "text-model": {"transformer": "gossamer.workloads.transformer:Transformer"},
    "partition": {
        "iid": "gossamer.workloads.partitions:iid",
        "dirichlet": "gossamer.workloads.partitions:dirichlet",
        "n-classes": "gossamer.workloads.partitions:n_classes",
        "shards": "gossamer.workloads.partitions:shards",
        "natural-id": "gossamer.workloads.partitions:natural_id",
    },
    "topology": {
        "ring": "gossamer.topology.classic:ring",
        "grid": "gossamer.topology.classic:grid",
        "torus": "gossamer.topology.classic:torus",
        "hypercube": "gossamer.topology.classic:hypercube",
        "star": "gossamer.topology.classic:star",
        "complete": "gossamer.topology.classic:complete",
        "static-exp": "gossamer.topology.classic:static_exp",
        "one-peer-exp": "gossamer.topology.onepeer:one_peer_exp",
        "random-match": "gossamer.topology.onepeer:random_match",
        "half-random": "gossamer.topology.randomgraphs:half_random",
        "erdos-renyi": "gossamer.topology.randomgraphs:erdos_renyi",
        "geometric": "gossamer.topology.randomgraphs:geometric",
        "random-regular": "gossamer.topology.randomgraphs:random_regular",
        "small-world": "gossamer.topology.randomgraphs:small_world",
        "d-equistatic": "gossamer.topology.equitopo:d_equistatic",
        "u-equistatic": "gossamer.topology.equitopo:u_equistatic",
        "od-equidyn": "gossamer.topology.equitopo:od_equidyn",
        "ou-equidyn": "gossamer.topology.equitopo:ou_equidyn",
        "od-equidyn-complete": "gossamer.topology.equitopo:od_equidyn_complete",
        "ou-equidyn-complete": "gossamer.topology.equitopo:ou_equidyn_complete",
        "hyper-hypercube": "gossamer.topology.finite:hyper_hypercube_family",
        "simple-base": "gossamer.topology.finite:simple_base_family",
        "base": "gossamer.topology.finite:base_family",
        "ceca": "gossamer.topology.onepeer:ceca",
        "el-oracle": "gossamer.topology.onepeer:el_oracle",
        "el-local": "gossamer.topology.onepeer:el_local",
        "file": "gossamer.topology.files:file",
    },
    "sampler": {"uniform": "gossamer.planning.clients:uniform"},
}


def names(kind: str) -> list[str]:
    """List the short names known for `kind`, entry points included."""
    return sorted({*BUILTIN.get(kind, {}), *(point.name for point in entry_points(group=f"gossamer.{kind}"))})


def resolve_function(kind: str, name: str) -> Callable[..., Any]:
    """Find the function, or the class, that `name` stands for; see `resolve`.

    Raises:
        ConfigError: it cannot be found, or not be called.
    """
    found: Callable[..., Any] = resolve(kind, name)
    if not callable(found):
        raise ConfigError(f"{kind} {name!r} is a {type(found).__name__}: give a function, or name another one")
    return found


def resolve(kind: str, name: str) -> Any:
    """Return the object of a name.

    Args:
        kind: a key of `BUILTIN`, such as ``"algorithm"``.
        name: short name, name of an entry point, or ``module:attribute``.

    Raises:
        RegistryError: the name is unknown, or its module or attribute cannot be imported.
        ConfigError: its module raises an error when it is imported.
    """
    target = BUILTIN.get(kind, {}).get(name)
    if target is None and ":" in name and name[0] not in ".:":
        target = name
    if target is None:
        for point in entry_points(group=f"gossamer.{kind}"):
            if point.name == name:
                target = point.value
    if target is None:
        known = names(kind)
        raise RegistryError(
            f"unknown {kind} {name!r}{nearest(name, known)} (known: {', '.join(known)}; or give 'module:attribute')"
        )
    module_name, _, attribute = target.partition(":")
    with plugin_errors(f"{kind} {name!r}"):
        try:
            found: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"cannot load {kind} {name!r} from {target!r}: {error}") from error
        except ConfigError as error:  # such as of its traits
            raise ConfigError(f"{kind} {name!r}: {error}") from error
    return found
