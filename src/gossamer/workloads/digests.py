"""A short digest of data, by which a resumed run notices that they are no longer the same."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.workloads.samples import LazySamples, pieces


def digest_of(*values: Any) -> str:
    """Return 32 hexadecimal digits that are the same in every process and change with any bit of `values` (BLAKE2b).

    Args:
        values: tensors, arrays, strings, numbers and None, and dataclasses, mappings and sequences of them; of anything
            else only the type counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, values)
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()  # NumPy has no such type
    if isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype.str} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, LazySamples) and not value.digest:  # as the same samples in memory
        dtype = torch.empty(0, dtype=value.dtype).numpy().dtype
        digest.update(f"array {dtype.str} {value.shape};".encode())
        for piece in pieces(value):
            digest.update(piece.contiguous().numpy().reshape(-1).view(np.uint8).data)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _update(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        _update(digest, [part for item in value.items() for part in item])
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)};".encode())
        for part in value:
            _update(digest, part)
    else:
        text = str(value) if isinstance(value, str | int | float | None) else ""
        digest.update(f"{type(value).__name__} {len(text)};{text}".encode())
