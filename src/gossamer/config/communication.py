"""Codecs between clients and their server: made, filled in, and refused where they are not sound."""

from __future__ import annotations

from typing import Any

from gossamer.aggregate.codec_base import BaseCodec, Communication
from gossamer.aggregate.codecs import Identity, make_codec
from gossamer.config.schema import CommunicationOptions, Config
from gossamer.engines.task import Task
from gossamer.errors import ConfigError
from gossamer.simulation.devices import Availability
from gossamer.submodel import Layout

WHERE = "communication"


def make_communication(options: CommunicationOptions) -> Communication:
    """Make the codecs of both directions; where error feedback is left open, biased codecs have it.

    Raises:
        ConfigError: a codec is unknown, or its options are wrong.
    """
    up, down = (
        None if isinstance(codec, Identity) else codec
        for codec in (
            make_codec(options.uplink, f"{WHERE}.uplink"),
            make_codec(options.downlink, f"{WHERE}.downlink"),
        )
    )
    is_biased = up is not None and not up.is_unbiased
    return Communication(up, is_biased if options.error_feedback is None else options.error_feedback, down)


def has_codec(config: Config, algorithm: Any) -> bool:
    """Say whether a codec compresses what clients send to their server, or peers to one another."""
    if config.peers is None:
        return make_communication(config.communication).uplink is not None
    phases = (algorithm.of_phase(phase) for phase in range(algorithm.traits.num_phases))
    return any(phase.traits.codecs for phase in phases)


def fill_in_communication(config: Config, algorithm: Any) -> CommunicationOptions:
    """Return the section with error feedback filled in.

    Raises:
        ConfigError: the codecs do not go with each other, with the algorithm, or with peers.
    """
    options, name = config.communication, config.algorithm["name"]
    made = make_communication(options)
    filled = options.model_copy(update={"error_feedback": made.error_feedback})
    if made == Communication():
        return filled
    if config.peers is not None:
        raise ConfigError(
            f"{WHERE} is between clients and their server, but peers have none: leave it out, or choose algorithm"
            " 'choco-sgd', which compresses by its option compressor"
        )
    _check_codecs(config, made)
    traits = algorithm.traits
    if traits.no_compression is not None:
        raise ConfigError(f"algorithm {name!r} does not go with {WHERE}, because {traits.no_compression}: leave it out")
    phases = [algorithm.of_phase(phase).traits for phase in range(traits.num_phases)]
    if made.uplink is not None and not any(phase.compressible for phase in phases):
        raise ConfigError(
            f"{WHERE}.uplink compresses payloads that are averaged, and algorithm {name!r} sends none: leave it out"
        )
    return filled


def _check_codecs(config: Config, made: Communication) -> None:
    options = config.communication
    up, down = options.uplink["name"], options.downlink["name"]
    if made.error_feedback and made.uplink is None:
        raise ConfigError(
            f"{WHERE}.error_feedback = True, but nothing is lost that could be fed back: name a codec in"
            f" {WHERE}.uplink, or leave it out"
        )
    if made.error_feedback and made.uplink is not None and made.uplink.is_unbiased:
        raise ConfigError(
            f"{WHERE}.error_feedback = True does not go with {WHERE}.uplink = {options.uplink}, which is unbiased and"
            " promises no contraction, so that residuals may grow: leave error_feedback out, or make the codec biased"
            f" ({'rounding: nearest' if up.startswith('int') else 'unbiased: false'})"
        )
    if made.sends_changes and (reason := _differ(config)) is not None:
        raise ConfigError(
            f"{WHERE}.downlink.name = {down!r} is biased, so that the server must send changes to what all clients"
            f" know, but {reason}: choose int8 or int4, whose rounding is stochastic, or quantise with unbiased: true"
        )


def _differ(config: Config) -> str | None:
    """Return why clients do not all know the same of the server's arrays; None: they do."""
    clients = config.clients
    assert clients is not None
    if clients.per_round < clients.num:
        return f"clients.per_round = {clients.per_round} of {clients.num} receive them"
    if tuple(config.submodel.capacities) != (1.0,):
        return f"submodel.capacities = {config.submodel.capacities} receive parts of them"
    profiles = [config.device] if config.devices is None else [share.profile for share in config.devices]
    away = next((profile.name for profile in profiles if profile.availability != Availability()), None)
    return None if away is None else f"device {away!r} is not always available"


def check_codecs(config: Config, layout: Layout, bytes_per_number: int) -> tuple[str, ...]:
    """Check codecs against the model, and return warnings.

    Args:
        layout: layout of the whole model.

    Raises:
        ConfigError: a codec leaves the model as it is.
    """
    made, d = make_communication(config.communication), layout.num_parameters
    found = []
    for where, codec in (("uplink", made.uplink), ("downlink", made.downlink)):
        if codec is not None:
            found += _of_codec(f"{WHERE}.{where}", codec.of_shapes(layout.shapes), d, bytes_per_number)
    if made.uplink is not None and not made.uplink.is_unbiased and not made.error_feedback:
        found.append(
            f"{WHERE}.uplink.name = {config.communication.uplink['name']!r} is biased, and without error feedback what"
            f" it loses is lost for good: set {WHERE}.error_feedback to true unless that is meant"
        )
    return tuple(found)


def require_whole_downlink(task: Task) -> None:
    """Check that a codec of what the server sends acts on what participants receive.

    Raises:
        ConfigError: it would act on parameters that are not sent, and its bytes would be those of the others.
    """
    variants, every = [one for phase in task.phases for one in phase.variants], frozenset(task.cutter.layout.names)
    unsent = sorted({name for one in variants for name in every - (frozenset(one.layout.names) - one.unsent)})
    if task.communication.downlink is not None and unsent:
        raise ConfigError(
            f"{WHERE}.downlink compresses whole models, but {unsent[0]!r} is not sent in every phase: leave it out, or"
            " send all parameters (no clients.personal, or another algorithm)"
        )


def _of_codec(where: str, codec: BaseCodec, d: int, bytes_per_number: int) -> list[str]:
    sent, size, omega = codec.row_bytes(d, bytes_per_number), d * bytes_per_number, codec.omega(d)
    if sent == size and codec.contraction(d) == 1.0:
        raise ConfigError(
            f"{where} = {codec.model_dump()} compresses nothing: no matrix of the model is larger than two factors of"
            " that rank: lower it, or choose another codec"
        )
    larger = f"{where} sends {sent:,} bytes for a model of {size:,}: choose a smaller share or fewer levels"
    noisy = (
        f"{where} may add noise of {omega:.3g} times the squared norm of what is sent (its worst case): choose more"
        " bits, levels or entries if training is unstable"
    )
    return [larger] * (sent > size) + [noisy] * (codec.is_unbiased and omega > 1)
