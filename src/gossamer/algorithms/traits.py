"""What an algorithm can and cannot do, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gossamer.aggregate.codecs import Codec
from gossamer.errors import ConfigError
from gossamer.options import Traits

Uplink = Literal["mean", "sum", "rows"]
LONG_ROW = 1 << 40  # numbers, of which a codec that keeps k loses some
RESERVED = {"held", "sent", "lr", "weights", "metrics"}  # what an inbox holds beside the payloads


@dataclass(frozen=True, kw_only=True)
class AlgorithmTraits(Traits):
    """What an algorithm can and cannot do; a method of its own derives them by `dataclasses.replace`.

    A reason is the end of a sentence, after "because"; None: there is none.

    Attributes:
        uplink: ``{payload name: "mean" (weighted, over the holders of a coordinate) | "sum" | "rows" (those of every
            participant, see `Algorithm.update`)}``. Peers' payloads, which may not be rows, are mixed by W either way;
            where not all hold a coordinate, a mean divides the weights by their sum over the holders.
        downlink: names of the state arrays that a participant receives; None: the participants are peers, who hold the
            state themselves.
        client_arrays: names of the arrays that `init_client` makes; () if clients keep nothing. They are kept in the
            width of the whole model: a participant gets what lies in its window of the round, and changes only that.
        scalars: names of payloads that are one number a participant: rows [s, 1] instead of [s, d]. They are weighted
            and added up like any other; a mean divides by the weight of all survivors, whatever they hold. Also
            such client arrays; of peers such state arrays.
        codecs: ``{payload name: codec}`` of payloads that are compressed before they are sent; to a server only such as
            lose nothing.
        num_phases: phases of a round, see `Algorithm.of_phase`; with several, what stands above is of each phase.

        capacities: meaning of ``submodel.capacities``: "one" (whole models, unless a strategy is given), "given" (every
            participant trains at its own), "smallest" or "largest" (all have that one, and so has the global model).
        strategy: window strategy that the algorithm has by definition, or None.
        default_label_mask: ``workload.label_mask`` where a configuration leaves it out.
        default_scaler: ``submodel.scaler`` likewise.
        full_size: whether everybody holds the whole model, whatever the capacity.
        whole_models_only: reason why sub-models cannot be trained.
        personal: what clients keep: what ``clients.personal`` names, if anything ("none"), what it must name ("given"),
            or the BatchNorm layers ("norms").
        personal_first: share of the local steps that train the personal parameters alone; the rest train the others.
        no_offsets: reason why windows cannot be moved by ``submodel.offsets``.
        one_round_only: reason why a run has a single round.
        scores_models: whether `Algorithm.update` measures models on training data that are held out for it.
        scored_by: metric that they are measured by, without ``validation_``, which the workload must have; None: any.

        has_local_loss: whether local steps have a loss of the algorithm's own, `Algorithm.local_loss`.
        transforms_parameters: whether a loss is given other parameters than ``carry["x"]``, `Algorithm.forward`.
        represents: whether `Algorithm.represent` follows the local steps. What travels are then representations of a
            public set, which the workload must have, and models stay with the clients.
        leaves_products: whether `Algorithm.local_loss` may be given `Leaves` that are factored.
        stackable: whether participants may be trained several at a time.
        no_momentum: reason why ``train.momentum`` must be 0.
        no_compression: reason why a run's codecs, ``communication``, must be left out.
        sgd_only: reason why local steps must be those of SGD, at the same learning rate for all parameters, capacities
            and steps of a round.

        joint: of peers, whether the payloads "x" and "y" go through a joint mixing as a state [n, 2, d].
        lazy: of peers, whether (I + W) / 2 takes the place of each W.
        overlaps: of peers, whether all that they send is known before local steps, so that it travels meanwhile.
        merge_every: of peers, number of rounds from one exact average of all to the next; None: never.
        no_merge: of peers, reason why ``peers.merge_every`` and ``peers.final_merge`` must be left out.
        one_step_only: of peers, reason why a round may not have several local steps.
    """

    hooks: ClassVar[Mapping[str, str]] = {
        "has_local_loss": "local_loss",
        "transforms_parameters": "forward",
        "represents": "represent",
    }

    uplink: Mapping[str, Uplink] = field(default_factory=lambda: {"x": "mean"})
    downlink: tuple[str, ...] | None = ("x",)
    client_arrays: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    num_phases: int = 1

    capacities: Literal["one", "given", "smallest", "largest"] = "one"
    strategy: str | None = None
    default_label_mask: Literal["none", "zero", "minus-inf"] = "none"
    default_scaler: bool = True
    full_size: bool = False
    whole_models_only: str | None = None
    personal: Literal["none", "given", "norms"] = "none"
    personal_first: float = 0.0
    no_offsets: str | None = None
    one_round_only: str | None = None
    scores_models: bool = False
    scored_by: str | None = None

    has_local_loss: bool = False
    transforms_parameters: bool = False
    represents: bool = False
    leaves_products: bool = False
    stackable: bool = True
    no_momentum: str | None = None
    no_compression: str | None = None
    sgd_only: str | None = None

    joint: bool = False
    lazy: bool = False
    overlaps: bool = False
    merge_every: int | None = None
    no_merge: str | None = None
    one_step_only: str | None = None

    @property
    def compressible(self) -> tuple[str, ...]:
        """Names of the payloads that a run's codec may compress: means, and neither scalars nor in a codec already."""
        taken = {*self.scalars, *self.codecs}
        return tuple(name for name, kind in self.uplink.items() if kind == "mean" and name not in taken)

    def __post_init__(self) -> None:
        """Refuse values of the wrong type, and traits that contradict one another."""
        super().__post_init__()
        refused = next((sentence for sentence, holds in self._contradictions().items() if holds), None)
        if refused is not None:
            raise ConfigError(f"AlgorithmTraits.{refused}")

    def _contradictions(self) -> dict[str, bool]:
        """Return what traits may not be together, and whether they are."""
        peers, reserved = self.downlink is None, sorted(RESERVED & {*self.uplink})
        sent = [*self.codecs, *(() if peers else (name for name in self.scalars if name not in self.client_arrays))]
        unsent = [name for name in sent if name not in self.uplink]
        for_peers = ("joint", "lazy", "overlaps", "merge_every", "no_merge", "one_step_only")
        unfit = [name for name in for_peers if vars(self)[name] and not peers]
        twice = sorted({*self.scalars} & {*self.codecs})
        lossy = [] if peers else [name for name, codec in self.codecs.items() if codec.contraction(LONG_ROW) < 1]
        lowest = min(self.num_phases, 1 if self.merge_every is None else self.merge_every)
        return {
            "uplink names no payload: name at least one": not self.uplink,
            f"uplink names {reserved}, which an inbox holds beside payloads: rename the payload": bool(reserved),
            f"scalars or codecs name {unsent}, which uplink does not: add it there (what clients keep, to"
            " client_arrays), or leave it out": bool(unsent),
            f"codecs compress {lossy} with a loss, which only peers do yet: leave them out, or set downlink to None": (
                bool(lossy)
            ),
            f"{twice} are among scalars and codecs, but a number is not compressed: leave one out": bool(twice),
            f"scalars = {self.scalars}, but 'x' is the model: leave it out": "x" in self.scalars,
            f"client_arrays = {self.client_arrays}, but peers keep everything as state: leave it out": (
                peers and bool(self.client_arrays)
            ),
            f"{unfit and unfit[0]} is for peers, but downlink = {self.downlink}: leave it out": bool(unfit),
            f"joint = True mixes the payloads x and y, but uplink names {[*self.uplink]}: name these two": (
                self.joint and {*self.uplink} != {"x", "y"}
            ),
            f"num_phases = {self.num_phases}, merge_every = {self.merge_every}: give numbers from 1 on": lowest < 1,
            "has_local_loss = True trains participants one by one: set stackable to False": (
                self.has_local_loss and self.stackable
            ),
            "uplink has rows, which only a server receives: give mean or sum to peers": (
                peers and "rows" in self.uplink.values()
            ),
            f"uplink gives {self.scalars} as rows, but these are numbers: give mean or sum": any(
                self.uplink.get(name) == "rows" for name in self.scalars
            ),
            "scores_models = True is for a server, but downlink = None: leave it out": peers and self.scores_models,
            "leaves_products = True is about a local loss: set has_local_loss to True": (
                self.leaves_products and not self.has_local_loss
            ),
        }
