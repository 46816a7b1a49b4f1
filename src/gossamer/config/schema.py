"""The sections of a configuration, as frozen models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from gossamer.config.offload import OffloadOptions
from gossamer.config.plugins import Plugin
from gossamer.config.recording import Recording
from gossamer.config.train import TrainConfig
from gossamer.engines.task import Device, VariantMode
from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.planning.stopping import StopOptions
from gossamer.simulation.devices import DeviceProfile, DeviceShare, Profile, check_devices
from gossamer.submodel.windows import check_capacity

DIRECTORY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


def default_workload(value: Any) -> Any:
    """Most workloads are image classification: its name may be left out."""
    return {"name": "image-classification", **value} if isinstance(value, Mapping) else value


class ModeOptions(VariantMode):
    """How one capacity is trained; filled in unless given.

    Attributes:
        capacity: the capacity that is trained so.
        holding: name of the modules that are trained so, where clients of the workload hold different ones.
    """

    capacity: float
    holding: str | None = None


class EngineOptions(Options):
    """Where training runs. `workers` and `block_size` change no bits; `modes` do, and are written once chosen.

    Attributes:
        name: local, ray, collective (on the ranks of torchrun), network (on clients that dial in, or on peers that dial
            each other), or a plug-in's.
        workers: processes, or Ray actors, that train; "auto": one for each core, on a cluster counted every round.
        block_size: participants that are trained together.
        modes: mode of each capacity, or one mode for all; "auto": by a rule of shapes and numbers, see `modes_by_rule`;
            "measured": the quickest, as measured when the run starts, which may differ from run to run, and with it the
            last bits.
        device: device of the gradients of all capacities, such as "cuda", in the place of those of `modes`; changes the
            last bits. None: those of `modes`.
        address: address of a Ray cluster, "auto" for the one on this machine; None: the run starts its own.
        kit: folder of the start-up kit of the server, or of the peer (``gossamer node provision``), without which
            engine network listens on loopback only; None: there is none.
        peer: number of the peer that this process is (``gossamer node peer``); None: it is not one of them.
        peers_file: file with the addresses of all peers, or folder into which those of one machine write theirs; None:
            the peers of engine network are processes of this machine.
        data: data set of this peer alone, in the place of its part of the workload's; None: that part.
        straggler_seconds: wall-clock seconds without an answer after which a Ray actor's work is done again elsewhere;
            long after that the actor is replaced. None: many times the longest answer so far, a minute at least. Of a
            local worker, seconds without an answer and without processor time after which it is replaced. None: 120. Of
            a rank of torchrun, seconds without a message after which the others give up, longer than a phase takes.
            None: 600.
    """

    name: str = "local"
    workers: int | Literal["auto"] = "auto"
    block_size: int | Literal["auto"] = "auto"
    modes: list[ModeOptions] | VariantMode | Literal["auto", "measured"] = "auto"
    device: Device | None = None
    address: str | None = None
    kit: str | None = None
    peer: int | None = Field(default=None, ge=0)
    peers_file: str | None = None
    data: Plugin | None = None
    straggler_seconds: float | None = Field(default=None, gt=0)

    @field_validator("workers", "block_size")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        if value != "auto" and value < 0:
            raise ValueError("give 'auto' or a number >= 0")
        return value

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: Any) -> Any:
        if value != "auto" and (value < 1 or value & (value - 1)):
            raise ValueError("give 'auto' or a power of two")
        return value


class ClientsOptions(Options):
    """The registered clients and how they are chosen.

    Attributes:
        num: registered clients.
        per_round: participants a round.
        partition: name and options of the partition of the data.
        sampler: name of the sampler of participants among those who are available.
        weighting: aggregation weights: number of samples, or equal.
        quorum: least share of the updates that a round waits for (`per_round`, or all who were available where these
            were fewer) which must be in time and usable.
        deadline_seconds: simulated seconds after which a round ends; who would take longer does not train. None: never.
        over_selection: factor by which more than `per_round` clients are chosen (rounded up), of whom the first
            `per_round` to finish in simulated time take part.
        personal: patterns of the names of parameters that stay with the client, such as ``["head.*"]``: they are
            trained, but neither sent nor averaged.
    """

    num: int = Field(ge=1)
    per_round: int = Field(ge=1)
    partition: Plugin = {"name": "iid"}
    sampler: str = "uniform"
    weighting: Literal["samples", "equal"] = "samples"
    quorum: float = Field(default=0.5, ge=0, le=1)
    deadline_seconds: float | None = Field(default=None, gt=0)
    over_selection: float = Field(default=1.0, ge=1)
    personal: list[str] = []

    @model_validator(mode="after")
    def _enough(self) -> ClientsOptions:
        if self.per_round > self.num:
            raise ValueError(
                f"clients.per_round {self.per_round} exceeds clients.num {self.num}: sample at most all of them"
            )
        return self


class PeersOptions(Options):
    """The peers of a decentralized run, all of which train and mix in every round.

    Attributes:
        num: peers; None: as many as the topology's file has.
        topology: name and parameters (``gossamer topology list``), or the path of a topology's file, YAML, GraphML or a
            list of edges; with ``n`` and ``seed``, which hold before those of the file, and these before `num` and the
            run's seed.
        partition: name and options of the partition of the data.
        merge_every: number of rounds from one mean of all peers to the next (Gossip-PGA); None: that of the algorithm.
        final_merge: whether the last round's mixing is the mean of all peers.
        quorum: least share of the peers' updates that must be usable in a round.
        absent_neighbour: what a peer on a machine of its own (``gossamer node peer``) does while a neighbour is gone:
            it waits for it, or goes on after `patience_seconds`, by dividing the weights of those who are there by
            their sum.
        patience_seconds: wall-clock seconds for which such a peer waits in a phase, unless it waits for ever.
    """

    num: int | None = Field(default=None, ge=2)
    topology: Plugin
    partition: Plugin = {"name": "iid"}
    merge_every: int | None = Field(default=None, ge=1)
    final_merge: bool = False
    quorum: float = Field(default=0.5, ge=0, le=1)
    absent_neighbour: Literal["wait", "renormalise"] = "wait"
    patience_seconds: float = Field(default=30.0, gt=0)


class SubmodelOptions(Options):
    """Capacities of clients and how their windows are chosen.

    Attributes:
        capacities: the levels, each in (0, 1].
        shares: share of the clients at each level; None: equal shares.
        assignment: fixed once, or drawn in every round ("dynamic").
        strategy: window strategy; None: the algorithm's own.
        stride: channels by which a rolling window moves a round.
        offsets: ``{axis: channels}`` by which an axis's windows are moved besides.
        scaler: multiply a sub-model's activations by 1 / capacity while training; None: whatever the algorithm does.
        mask_labels: average label rows over the clients that hold the label; None: whatever suits the algorithm.
    """

    capacities: list[float] = [1.0]
    shares: list[float] | None = None
    assignment: Literal["fixed", "dynamic"] = "fixed"
    strategy: str | None = None
    stride: int = 1
    offsets: dict[str, int] = {}
    scaler: bool | None = None
    mask_labels: bool | None = None

    @field_validator("capacities")
    @classmethod
    def _levels(cls, value: list[float]) -> list[float]:
        if not value:
            raise ValueError("give at least one capacity")
        for capacity in value:
            try:
                check_capacity(capacity)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if len(set(value)) != len(value):
            raise ValueError("name every capacity once, and their frequencies in submodel.shares")
        return value

    @model_validator(mode="after")
    def _matching(self) -> SubmodelOptions:
        if self.shares is not None:
            if len(self.shares) != len(self.capacities):
                raise ValueError(
                    f"submodel.shares has {len(self.shares)} entries for {len(self.capacities)} capacities"
                )
            if min(self.shares) < 0 or sum(self.shares) <= 0:
                raise ValueError(f"submodel.shares {self.shares} must be >= 0 and not all 0")
        return self


class AggregationOptions(Options):
    """What may be averaged.

    Attributes:
        max_update_norm_ratio: an update is dropped whose norm is more than so many times that of what the participant
            started from, and the median norm of the others' updates, too; None: any finite update is used.
    """

    max_update_norm_ratio: float | None = Field(default=1e6, gt=1)


class CommunicationOptions(Options):
    """How clients and their server compress what they send, see `gossamer.aggregate.codecs`.

    Attributes:
        uplink: name and options of the codec of payloads that are averaged; each client has random numbers of its own.
        error_feedback: whether a client keeps what was lost and adds it to its next payload, as private state; None:
            where the codec is biased.
        downlink: name and options of the codec of what participants receive, the same for all of a round. An unbiased
            one is applied to the model. A biased one is applied to the change since what clients know, so that all of
            them must take part in every round, with the whole model.
    """

    uplink: Plugin = {"name": "none"}
    error_feedback: bool | None = None
    downlink: Plugin = {"name": "none"}


class EvaluationOptions(Options):
    """When and what to evaluate, on the test data, or on the training data that `workload.validation` holds out.

    Attributes:
        every: rounds between evaluations of the whole model; of peers: of their mean, the merged model.
        by_capacity: evaluate every sub-model size too.
        by_holding: evaluate also what each kind of client holds, of each size: the modules of its modalities and tasks.
        num_peers: peers whose own models are evaluated too, evenly spaced; no more than there are.
        num_clients: clients, likewise, whose own models are evaluated where they keep parameters or are fine-tuned.
        fine_tune_steps: local steps after which the models of these clients are evaluated again, and then forgotten.
        on_clients: whether real clients, which dial in, evaluate the model on test data of their own.
    """

    every: int = Field(default=1, ge=1)
    by_capacity: bool = False
    by_holding: bool = False
    num_peers: int = Field(default=8, ge=0)
    num_clients: int = Field(default=8, ge=1)
    fine_tune_steps: int = Field(default=0, ge=0)
    on_clients: bool = True


class CheckpointOptions(Options):
    """When a run is committed, so that it can be resumed.

    Attributes:
        every_seconds: least time between two commits; 0: after every phase of a round.
        keep: number of commits that are kept.
    """

    every_seconds: float = Field(default=30.0, ge=0)
    keep: int = Field(default=2, ge=2)


class LogOptions(Options):
    """Trackers besides the run directory's own logs.

    Attributes:
        sinks: names of trackers: any of "tensorboard", "mlflow", "wandb", see docs/trackers.md.
    """

    sinks: list[str] = []


class Config(Options):
    """One experiment: either `clients` of a server train, or `peers` without one.

    Attributes:
        name: name of the experiment, and of its directory.
        seed: seed of everything that is drawn.
        seeds: list of seeds, each of which is a run; None: `seed` alone.
        rounds: number of rounds.
        workload: name and options of data, model, loss and metrics; without a name, image classification.
        clients: those who train for a server.
        peers: those who train without one.
        train: local training.
        algorithm: name and options of the algorithm; where peers train and none is given, dsgd.
        submodel: sub-models of clients, or peers, of unequal size.
        aggregation: which updates may be averaged.
        evaluation: when and what to evaluate.
        stop: when to end before the last round.
        checkpoint: when to commit.
        device: profile of every participant's device: the name of one that ships here, the path of a YAML file, or its
            own keys.
        devices: several profiles instead, by share or by capacity.
        engine: where training runs; a bare name is its `name`.
        log: trackers.
        profile: what is recorded of where the time goes, for ``gossamer profile``; true: spans. Changes no bits.
        offload: a stage that a side-car process does, as a device would; changes no bits. None: no stage.
        replay: path of the directory of a run of real clients, or of a folder with the runs of real peers; those whom
            the clock dropped there are dropped again.
        methods: ``{name: {key: value}}``, each a run (of each seed) in which these keys are replaced.
    """

    name: str = "run"
    seed: int = Field(default=0, ge=0)
    seeds: list[int] | None = None
    rounds: int = Field(ge=1)
    workload: Annotated[Plugin, BeforeValidator(default_workload)]
    clients: ClientsOptions | None = None
    peers: PeersOptions | None = None
    train: TrainConfig
    algorithm: Plugin = {"name": "fedavg"}
    submodel: SubmodelOptions = SubmodelOptions()
    aggregation: AggregationOptions = AggregationOptions()
    communication: CommunicationOptions = CommunicationOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    stop: StopOptions | None = None
    checkpoint: CheckpointOptions = CheckpointOptions()
    device: Profile = DeviceProfile()
    devices: list[DeviceShare] | None = None
    engine: EngineOptions = EngineOptions()
    log: LogOptions = LogOptions()
    profile: Recording = None
    offload: OffloadOptions | None = None
    replay: str | None = None
    methods: dict[str, dict[str, Any]] | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(DIRECTORY_NAME, value):
            raise ValueError("use letters, digits, '.', '_' and '-', 100 at most, because it names a directory")
        return value

    @field_validator("devices")
    @classmethod
    def _one_kind_of_devices(cls, value: list[DeviceShare] | None) -> list[DeviceShare] | None:
        if value is not None:
            check_devices(value)
        return value

    @model_validator(mode="after")
    def _device_or_devices(self) -> Config:
        if self.devices is not None and self.device != DeviceProfile():
            raise ValueError(
                f"device {self.device.name!r} contradicts devices, which give every client one: leave device out"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _clients_or_peers(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = [name for name in ("clients", "peers") if data.get(name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) if given else 'neither clients nor peers'} are given: give clients (they have a"
                " server) or peers (they have a topology), and not both"
            )
        return {"algorithm": "dsgd", **data} if given == ["peers"] else data

    @property
    def population(self) -> ClientsOptions | PeersOptions:
        """The section of those who train: clients or peers."""
        found = self.peers if self.clients is None else self.clients
        assert found is not None
        return found

    @model_validator(mode="before")
    @classmethod
    def _engine_by_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("engine"), str):
            return {**data, "engine": {"name": data["engine"]}}
        return data
