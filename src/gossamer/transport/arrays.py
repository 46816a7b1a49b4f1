"""Arrays as the bytes of a safetensors file, without a copy: its header, and views of the memory that its data are.

Source of the format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import Dropped, TransportError
from gossamer.transport.messages import Spec

_LENGTH_BYTES, _ALIGNMENT = 8, 8
_MAX_DIMENSIONS, _MAX_NAME = 16, 512
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def num_bytes_of(spec: Spec) -> int:
    """Return the bytes of an array of a dtype and a shape."""
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def in_order(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arrays in the order of their data: the widest dtypes first, so that all are aligned, then by name."""
    return dict(sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def encode_specs(arrays: Mapping[str, Tensor]) -> bytes:
    """Return the header of the safetensors file whose data are `arrays`, one after another; none: no bytes.

    Raises:
        TransportError: an array cannot be sent as it is.
    """
    described, end = {}, 0
    for name, array in arrays.items():
        if (
            array.dtype not in _NAMES
            or array.device.type != "cpu"
            or not array.is_contiguous()
            or len(name) > _MAX_NAME
        ):
            raise TransportError(
                f"array {name[:80]!r} ({array.dtype}, strides {array.stride()}, on {array.device}) cannot be sent: give"
                f" contiguous ones in the machine's memory, of {', '.join(str(dtype) for dtype in _NAMES)}"
            )
        start, end = end, end + array.numel() * array.itemsize
        described[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    if not described:
        return b""
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded


def decode_specs(encoded: bytes, num_bytes: int, max_arrays: int) -> dict[str, Spec]:
    """Return dtype and shape of each array that a safetensors header describes; nothing is allocated for them.

    Args:
        num_bytes: that they take together.

    Raises:
        Dropped: the header is malformed, or describes other than `num_bytes` bytes, or more than `max_arrays` arrays.
    """
    if not encoded and not num_bytes:
        return {}
    try:
        length = int.from_bytes(encoded[:_LENGTH_BYTES], "little")
        if length != len(encoded) - _LENGTH_BYTES:
            raise ValueError
        described = json.loads(encoded[_LENGTH_BYTES:], object_pairs_hook=_without_duplicates)
        if len(described) > max_arrays:
            raise Dropped("too many arrays")
        end, specs = 0, {}
        for name, one in described.items():
            specs[name] = spec = _spec(name, one)
            start, end = end, end + num_bytes_of(spec)
            if one["data_offsets"] != [start, end]:
                raise ValueError
        if end != num_bytes:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Dropped("malformed arrays") from None
    return specs


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _spec(name: str, described: Mapping[str, Any]) -> Spec:
    shape = described["shape"]
    if len(described) != 3 or len(name) > _MAX_NAME or type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        raise ValueError
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(max(1, size) for size in shape) > 2**48:
        raise ValueError
    return _DTYPES[described["dtype"]], tuple(shape)


def view_of(array: Tensor) -> memoryview:
    """Return the memory of a contiguous array as bytes."""
    return array.detach().reshape(-1).view(torch.uint8).numpy().data


def allocate(specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Return uninitialised arrays, each with memory of its own, so that each is aligned as torch aligns its tensors."""
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}


def check_targets(targets: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Return the arrays to read into, in the order of `specs`.

    Raises:
        Dropped: their names, dtypes or shapes are not those of `specs`.
    """
    if {name: (array.dtype, tuple(array.shape)) for name, array in targets.items()} != dict(specs):
        raise Dropped("wrong arrays")
    return {name: targets[name] for name in specs}


def check_values(arrays: Mapping[str, Tensor]) -> None:
    """Check that the bytes of arrays of booleans are booleans; of other dtypes all are values.

    Raises:
        Dropped: they are not.
    """
    for array in arrays.values():
        if array.dtype == torch.bool and array.numel() and int(array.view(torch.uint8).max()) > 1:
            raise Dropped("malformed arrays")
