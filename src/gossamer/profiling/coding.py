"""Codecs whose work a side-car does: what a run compresses, wherever in it that happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PrivateAttr
from torch import Tensor

from gossamer.aggregate.codec_base import BaseCodec, Codec, Draws
from gossamer.profiling.sidecar import Handler, Message, Port

Codecs = Mapping[str, Codec]


class RemoteCodec(BaseCodec):
    """A codec that has a side-car compress, encode and decode rows, with the bits of the codec itself."""

    _codec: Codec = PrivateAttr()
    _name: str = PrivateAttr()
    _port: Port = PrivateAttr()

    @classmethod
    def of(cls, codec: Codec, name: str, port: Port) -> Self:
        """Return it; `name` is that of the codec among those of `coder`."""
        made = cls()
        made._codec, made._name, made._port = codec, name, port
        return made

    @property
    def is_unbiased(self) -> bool:
        """See `BaseCodec`."""
        return isinstance(self._codec, BaseCodec) and self._codec.is_unbiased

    def omega(self, d: int) -> float:
        """See `BaseCodec`."""
        return self._bound.omega(d) if isinstance(self._bound, BaseCodec) else 0.0

    def compress(self, rows: Tensor, *, seed: int, round: int, phase: int = 0, peers: NDArray[np.int64]) -> Tensor:
        """See `Codec`."""
        return self._ask("compress", rows, Draws(seed=seed, round=round, phase=phase, peers=peers))

    def encode(self, rows: Tensor, **draws: Unpack[Draws]) -> Tensor:
        """See `Codec`."""
        return self._ask("encode", rows, draws)

    def decode(self, codes: Tensor, d: int, dtype: torch.dtype, **draws: Unpack[Draws]) -> Tensor:
        """See `Codec`."""
        return self._ask("decode", codes, draws, d=d, dtype=str(dtype).removeprefix("torch."))

    def row_bytes(self, d: int, bytes_per_number: int) -> int:
        """See `Codec`."""
        return self._bound.row_bytes(d, bytes_per_number)

    def contraction(self, d: int) -> float:
        """See `Codec`."""
        return self._bound.contraction(d)

    @property
    def _bound(self) -> Codec:
        return bound(self._codec, self._shapes)

    def _ask(self, verb: str, rows: Tensor, draws: Draws, **fields: Any) -> Tensor:
        told = {**draws, "peers": draws["peers"].tolist()}
        message = {"verb": verb, "codec": self._name, "shapes": self._shapes, "draws": told, **fields}
        (found,) = self._port.call(message, [rows]).arrays
        return found


def bound(codec: Codec, shapes: Any) -> Codec:
    """Return a codec for rows that consist of tensors of these shapes; of none: one that sees a row as a vector."""
    return codec.of_shapes(tuple(map(tuple, shapes))) if shapes and isinstance(codec, BaseCodec) else codec


def coder(codecs: Codecs) -> Handler:
    """Return what a side-car does with the messages of `RemoteCodec`s."""

    def handle(message: Message, arrays: list[Tensor]) -> tuple[Message, list[Tensor]]:
        """Compress, encode or decode rows."""
        (rows,), codec = arrays, bound(codecs[message["codec"]], message["shapes"])
        draws: Any = {**message["draws"], "peers": np.array(message["draws"]["peers"], dtype=np.int64)}
        if message["verb"] == "compress":
            return {}, [codec.compress(rows, **draws)]
        if message["verb"] == "encode":
            return {}, [codec.encode(rows, **draws)]
        return {}, [codec.decode(rows, message["d"], vars(torch)[message["dtype"]], **draws)]

    return handle
