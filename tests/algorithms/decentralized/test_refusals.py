"""Which topologies, options and modes decentralized algorithms refuse, and of what they warn."""

from __future__ import annotations

from typing import Any

import networkx
import pytest
from slow_decentralized import pushing

from gossamer.algorithms.decentralized.ceca import DSGDCECA
from gossamer.algorithms.decentralized.choco import ChocoSGD
from gossamer.algorithms.decentralized.diffusion import D2, ExactDiffusion
from gossamer.algorithms.decentralized.dsgd import DSGD, GossipPGA, QuasiGlobalMomentum
from gossamer.algorithms.decentralized.pushsum import StochasticGradientPush
from gossamer.algorithms.decentralized.tracking import DSGT
from gossamer.errors import ConfigError
from gossamer.topology import Topology, build

METHODS: dict[str, Any] = {
    "dsgd": DSGD({}),
    "gossip-pga": GossipPGA({}),
    "quasi-global-momentum": QuasiGlobalMomentum({}, momentum=0.9),
    "dsgt": DSGT({}),
    "exact-diffusion": ExactDiffusion({}),
    "d2": D2({}),
    "push-sum": StochasticGradientPush({}),
    "choco-sgd": ChocoSGD({}),
    "dsgd-ceca": DSGDCECA({}),
}


def graph(name: str, n: int = 8) -> Topology:
    return pushing(n) if name == "push" else build(name, n)


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        (
            "dsgd",
            "push",
            "DSGD does not go with topology 'by-hand', because only its columns sum to 1.*'push-sum'",
        ),
        ("dsgd", "ceca", "because it mixes two rows of each peer.*take algorithm 'dsgd-ceca'"),
        ("gossip-pga", "ceca", "GossipPGA does not .*'dsgd-ceca'"),
        ("quasi-global-momentum", "push", "QuasiGlobalMomentum .* models shrink or grow"),
        (
            "dsgt",
            "push",
            "it is column-stochastic only, and its trackers must keep the sum of all gradients: choose",
        ),
        ("dsgt", "el-local", "'el-local', because it is row-stochastic only"),
        ("dsgt", "ceca", "take algorithm 'dsgd-ceca'"),
        (
            "exact-diffusion",
            "one-peer-exp",
            "its mixings change from round to round, and its correction needs",
        ),
        (
            "exact-diffusion",
            "ou-equidyn",
            "change from round to round.*: choose a static, undirected topology.*dsgt",
        ),
        ("exact-diffusion", "static-exp", "its mixing is not symmetric"),
        ("d2", "push", "it is column-stochastic only, and its correction"),
        ("d2", "d-equistatic", "D2 .* its mixing is not symmetric"),
        ("d2", "ring", "its least eigenvalue is -0.3333, and D2 diverges at -1/3 or below: set lazy: true, or"),
        ("d2", "hypercube", "its least eigenvalue is -0.5"),
        (
            "push-sum",
            "el-local",
            "StochasticGradientPush .* because only its rows sum to 1.*: choose a doubly stochastic",
        ),
        ("push-sum", "ceca", "mixes two rows of each peer"),
        ("choco-sgd", "random-match", "what a peer keeps of its neighbours' sum belongs to one symmetric"),
        ("choco-sgd", "static-exp", "ChocoSGD .* not symmetric.*algorithm 'dsgd'"),
        ("dsgd-ceca", "ring", "DSGDCECA .* it mixes one row of each peer, of which this .* choose topology 'ceca', or"),
    ],
)
def test_excluded_topologies(method: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        METHODS[method].check(graph(name))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("dsgd", ["ring", "static-exp", "one-peer-exp", "od-equidyn", "el-oracle", "base"]),
        ("gossip-pga", ["ring", "random-match"]),
        ("quasi-global-momentum", ["d-equistatic", "ou-equidyn"]),
        ("dsgt", ["complete", "one-peer-exp", "od-equidyn", "star"]),
        ("exact-diffusion", ["ring", "hypercube", "complete", "star", "u-equistatic"]),
        ("d2", ["complete", "star"]),
        ("push-sum", ["push", "ring", "static-exp", "od-equidyn"]),
        ("choco-sgd", ["ring", "star", "u-equistatic"]),
        ("dsgd-ceca", ["ceca"]),
    ],
)
def test_welcome_topologies(method: str, names: list[str]) -> None:
    for name in names:
        assert METHODS[method].check(graph(name)) == [], name


def test_push_sum_on_a_graph_from_outside() -> None:
    """How a user gets a column-stochastic topology."""
    directed = networkx.DiGraph()
    directed.add_weighted_edges_from([(0, 1, 0.5), (1, 2, 0.25), (1, 0, 0.25), (2, 0, 0.5)])
    found = build("file", graph=directed, weights="given", stochasticity="column")
    assert METHODS["push-sum"].check(found) == []
    with pytest.raises(ConfigError, match="take algorithm 'push-sum'"):
        METHODS["dsgd"].check(found)


def test_exact_averages_and_changes_after_them() -> None:
    with pytest.raises(
        ConfigError, match=r"GossipPGA with algorithm\.order = 'combine-while-adapt' never ends in an exact"
    ):
        GossipPGA({"order": "combine-while-adapt"})


class TestWarnings:
    @pytest.mark.parametrize("method", ["dsgd", "gossip-pga", "quasi-global-momentum"])
    def test_means_that_drift(self, method: str) -> None:
        (warning,) = METHODS[method].check(graph("el-local"))
        assert "'el-local' is row-stochastic only: the mean of the models drifts" in warning

    def test_negative_eigenvalues(self) -> None:
        (warning,) = METHODS["dsgt"].check(graph("hypercube"))
        assert "train.lr times the largest curvature of the loss is below 1.5, not below 2" in warning
        assert "lazy: true has the limit 2, but averages slower" in warning
        assert METHODS["dsgt"].check(build("hypercube", 8, lazy=True)) == []

    @pytest.mark.parametrize("name", ["ring", "static-exp", "od-equidyn", "base"])
    def test_no_graph_whose_steps_are_those_of_descent(self, name: str) -> None:
        """Eigenvalues of -1/3, as of a ring of 10, bound nothing: lazy would only slow it down."""
        assert METHODS["dsgt"].check(build(name, 10)) == []

    def test_lazy_makes_d2_possible(self) -> None:
        assert METHODS["d2"].check(build("ring", 8, lazy=True)) == []

    def test_what_is_too_large_to_tell(self) -> None:
        assert METHODS["dsgt"].check(build("ring", 3000)) == []
        (warning,) = METHODS["d2"].check(build("torus", 3025))
        assert "is not computed for n = 3025" in warning


class TestOptions:
    @pytest.mark.parametrize("method", [DSGT, D2, ExactDiffusion])
    def test_momentum(self, method: Any) -> None:
        with pytest.raises(ConfigError, match=rf"{method.__name__} does not go with train.momentum = 0.9, because its"):
            method({}, momentum=0.9)

    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            (DSGD, {"order": "awc"}, "algorithm.order = 'awc': input should be 'adapt-then-combine' or 'combine"),
            (DSGD, {"mix_momentum": True}, "algorithm.mix_momentum = True, but train.momentum is 0"),
            (GossipPGA, {"period": 0}, "algorithm.period = 0"),
            (DSGD, {"period": 3}, "unknown key 'algorithm.period'"),
            (QuasiGlobalMomentum, {}, "train.momentum = 0 is DSGD: set it, or take algorithm 'dsgd'"),
            (DSGT, {"lazy": True}, "unknown key 'algorithm.lazy'"),
            (ChocoSGD, {"gamma": 0}, "algorithm.gamma = 0"),
            (ChocoSGD, {"compressor": "top"}, "algorithm.compressor.name = 'top' is no codec"),
            (ChocoSGD, {"compressor": {"name": "top-k"}}, "give either share or k"),
            (ChocoSGD, {"compressor": {"name": "sign", "k": 3}}, "unknown key 'algorithm.compressor.k'"),
        ],
    )
    def test_wrong_ones(self, method: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            method(options)
        assert message in str(caught.value)

    def test_quasi_global_mu(self) -> None:
        with pytest.raises(ConfigError, match=r"algorithm\.mu = 1"):
            QuasiGlobalMomentum({"mu": 1}, momentum=0.9)


def test_who_trains_sub_models() -> None:
    able = {
        name
        for name, each in METHODS.items()
        if each.traits.capacities == "given" and each.traits.whole_models_only is None
    }
    assert able == {"dsgd", "gossip-pga", "quasi-global-momentum"}
    assert all(each.traits.whole_models_only for name, each in METHODS.items() if name not in able)
    assert DSGD({"order": "combine-while-adapt"}).traits.whole_models_only is not None


def test_who_cannot_merge() -> None:
    assert {name for name, each in METHODS.items() if each.traits.no_merge} == {"exact-diffusion", "d2", "choco-sgd"}


def test_who_needs_single_steps() -> None:
    assert {name for name, each in METHODS.items() if each.traits.one_step_only} == {"exact-diffusion", "d2"}
