"""Videos as arrays, decoded by PyAV (the extra ``video``), which is imported here alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import DataError
from gossamer.workloads.datasets import WHERE

Size = tuple[int, int]


def uniform_frames(num_frames: int, total: int) -> NDArray[np.int64]:
    """Return the frames in the middle of `num_frames` equal parts of a video of `total`, int64; some twice if short."""
    return (2 * np.arange(num_frames, dtype=np.int64) + 1) * total // (2 * num_frames)


def read_video(path: str, num_frames: int, size: Size | None, where: str) -> NDArray[np.uint8]:
    """Return frames of a video, uint8 [num_frames, 3, height, width], see `uniform_frames`.

    It is decoded from its beginning up to the last of them, one after another, which is right for any codec.

    Args:
        path: file of any format that FFmpeg decodes.
        num_frames: number of frames.
        size: height and width to which they are resized; None: those that they have.
        where: what names the video, for errors.

    Raises:
        DataError: PyAV is not installed, the file is no video, is empty or cut short, or its frames differ in size.
    """
    total = _count_frames(path, where)
    wanted = uniform_frames(num_frames, total)
    found = dict[int, NDArray[np.uint8]]()
    number = -1
    with _opened(path, where) as container:
        for number, frame in enumerate(_decoded(container)):
            if number in wanted:
                found[number] = _pixels(frame, size)
            if number == wanted[-1]:
                break
    if number < wanted[-1]:
        raise DataError(f"{where} is cut short after {number + 1} of {total} frames: fetch it again, or drop it")
    shapes = sorted({pixels.shape[1:] for pixels in found.values()})
    if len(shapes) > 1:
        raise DataError(
            f"{where} has frames of {' and '.join(f'{height} x {width}' for height, width in shapes)} pixels: give"
            f" {WHERE}.size, to which all are resized"
        )
    return np.stack([found[int(number)] for number in wanted])


def video_size(path: str, where: str) -> Size:
    """Return height and width of the first frame, which is decoded.

    Raises:
        DataError: as of `read_video`.
    """
    with _opened(path, where) as container:
        for frame in _decoded(container):
            return int(frame.height), int(frame.width)
    raise DataError(f"{where} has no frames: fetch it again, or drop it")


@dataclass(frozen=True, eq=False)
class VideoFiles:
    """Reads frames of videos from files.

    Attributes:
        paths: paths of the files.
        wheres: what names each, for errors.
        num_frames: frames of each, see `uniform_frames`.
        size: height and width to which they are resized.
    """

    paths: Sequence[str]
    wheres: Sequence[str]
    num_frames: int
    size: Size

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return videos, uint8 [b, frames, 3, height, width], see `gossamer.workloads.samples.Source`.

        Raises:
            DataError: a file cannot be read by now.
        """
        numbers, places = np.unique(rows, return_inverse=True)
        found = np.empty((len(numbers), self.num_frames, 3, *self.size), dtype=np.uint8)
        for place, row in enumerate(numbers.tolist()):
            found[place] = read_video(self.paths[row], self.num_frames, self.size, self.wheres[row])
        return torch.from_numpy(found)[torch.from_numpy(places)]

    def forget(self) -> None:
        """Do nothing: nothing is kept."""


@contextmanager
def _opened(path: str, where: str) -> Iterator[Any]:
    """Open a file as an `av` container for the block.

    Raises:
        DataError: PyAV is not installed, or the file has no frames that can be read.
    """
    try:
        import av
    except ImportError:
        raise DataError("videos are decoded by PyAV, which is not installed: pip install 'gossamer[video]'") from None
    try:
        with av.open(path, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DataError(f"{where} has no video stream: fetch it again, or drop it")
            yield container
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = str(error.strerror if isinstance(error, OSError | av.error.FFmpegError) else error).partition("\n")[0]
        raise DataError(f"{where} is not a video that can be read ({reason}): fetch it again, or drop it") from None


def _count_frames(path: str, where: str) -> int:
    """Return the number of frames that a file states, or that are in it if it states none.

    Raises:
        DataError: there are none, or as of `_opened`.
    """
    with _opened(path, where) as container:
        stream = container.streams.video[0]
        total = int(stream.frames) or sum(packet.size > 0 for packet in container.demux(stream))
    if total == 0:
        raise DataError(f"{where} has no frames: fetch it again, or drop it")
    return total


def _decoded(container: Any) -> Iterator[Any]:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # as of a worker
    return iter(container.decode(stream))


def _pixels(frame: Any, size: Size | None) -> NDArray[np.uint8]:
    height, width = (frame.height, frame.width) if size is None else size
    resized = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR")
    pixels: NDArray[np.uint8] = resized.to_ndarray().transpose(2, 0, 1)
    return pixels
