"""Images that are read from a zip file when they are needed."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import DataError
from gossamer.workloads.datasets_hub import decode_image


class _Opened(NamedTuple):
    """A zip file, and the process that has opened it: another one would share its place in the file."""

    process: int
    file: zipfile.ZipFile


@dataclass(eq=False)
class ZippedImages:
    """Reads images from a zip file.

    Attributes:
        path: the file.
        names: the images, by their names in it.
        size: height and width to which they are resized.
        mode: ``"RGB"`` or ``"L"`` (grey).
    """

    path: str
    names: Sequence[str]
    size: tuple[int, int]
    mode: str = "RGB"
    _opened: _Opened | None = field(default=None, repr=False)

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return images, uint8 [b, channels, height, width], see `gossamer.workloads.samples.Source`.

        Raises:
            DataError: the file or an image is missing or damaged.
        """
        found = np.empty((len(rows), len(self.mode), *self.size), dtype=np.uint8)
        for place, row in enumerate(rows):
            name = self.names[int(row)]
            try:
                content = self._file().read(name)
            except KeyError:
                raise DataError(f"{self.path!r} has no image {name!r}: fetch the file again") from None
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"cannot read {name!r} from {self.path!r} ({error}): fetch the file again") from None
            found[place] = decode_image(content, self.mode, f"{name!r} in {self.path!r}", self.size)
        return torch.from_numpy(found)

    def forget(self) -> None:
        """Close the file, see `gossamer.workloads.samples.Source`."""
        if self._opened is not None and self._opened.process == os.getpid():
            self._opened.file.close()
        self._opened = None

    def held(self) -> frozenset[str]:
        """Return the names of all that the file holds.

        Raises:
            DataError: it is missing or no zip file.
        """
        try:
            return frozenset(self._file().namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot read {self.path!r} as a zip file ({error}): fetch it again") from None

    def _file(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened.process != os.getpid():
            self._opened = _Opened(os.getpid(), zipfile.ZipFile(self.path))
        return self._opened.file
