"""Videos with captions, questions and answers; captioned moving digits, made of scikit-learn's, need no download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.errors import DataError
from gossamer.options import Options, parse_options, takes
from gossamer.workloads.datasets import digits
from gossamer.workloads.multimodal.tokens import SPECIAL

WHERE = "workload.dataset"
PAD, UNKNOWN, BEGIN, END, MASK = range(len(SPECIAL))  # the first tokens of every vocabulary
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows and columns
MOTIONS = tuple((first, last) for first, last in product(DIRECTIONS, DIRECTIONS) if first != last)
QUESTIONS = ("which digit moves", "where does it move first", "where does it move last")
SIDE = 8  # pixels of a digit


@dataclass(frozen=True, eq=False)
class Clips:
    """Videos and what is said of them; all tensors have a sample in each of N rows.

    Attributes:
        video: uint8 [N, frames, channels, height, width].
        caption: int64 [N, n], `BEGIN`, words, `END`, then `PAD`.
        question: int64 [N, q, m], likewise, of each of q questions.
        answer: int64 [N, q], one word to each.
        labels: ``{name: int64 [N]}``, classes of the video.
    """

    video: Tensor
    caption: Tensor
    question: Tensor
    answer: Tensor
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True, eq=False)
class ClipData:
    """A data set of videos and texts.

    Attributes:
        name: of the data set.
        train, test: its clips.
        vocabulary: words by their numbers, beginning with `SPECIAL`.
        num_labels: ``{name: classes}`` of the labels.
        partition_label: name of the label by which partitions by class divide.
        pool: test clips, in order, among which a caption is to be found; none of a pool have the same caption.
        mean, std: of pixels from 0 to 1, by which videos are normalised.
        label_words: ``{name: (word, ...)}`` of the labels whose classes captions name by a word.
    """

    name: str
    train: Clips
    test: Clips
    vocabulary: tuple[str, ...]
    num_labels: dict[str, int]
    partition_label: str
    pool: int
    mean: float = 0.0
    std: float = 1.0
    label_words: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what a model relies on.

        Raises:
            DataError: there are no clips, or lengths, tokens or labels are out of range.
        """
        for split, clips in (("train", self.train), ("test", self.test)):
            if not len(clips):
                raise DataError(f"data set {self.name!r} has no {split} clips: give at least one")
            if clips.video.dtype != torch.uint8 or clips.video.dim() != 5:
                raise DataError(
                    f"the {split} videos of {self.name!r} are {clips.video.dtype} of shape {tuple(clips.video.shape)}:"
                    " give uint8 [clips, frames, channels, height, width]"
                )
            self._check_tokens(split, clips)
            for name, num in self.num_labels.items():
                label = clips.labels[name]
                if label.shape != (len(clips),) or int(label.min()) < 0 or int(label.max()) >= num:
                    raise DataError(f"label {name!r} of the {split} clips of {self.name!r} is outside 0 .. {num - 1}")

        for name, words in self.label_words.items():
            unknown = next((word for word in words if word not in self.vocabulary), None)
            if unknown is not None or len(words) != self.num_labels.get(name):
                raise DataError(
                    f"label_words of {self.name!r} has {len(words)} words for {name!r}, which has"
                    f" {self.num_labels.get(name, 0)} classes"
                    + ("" if unknown is None else f", and {unknown!r} is not in the vocabulary")
                    + ": give a known word for each class"
                )

    def _check_tokens(self, split: str, clips: Clips) -> None:
        texts = {"caption": clips.caption, "question": clips.question, "answer": clips.answer}
        for what, tokens in texts.items():
            if len(tokens) != len(clips):
                raise DataError(
                    f"{self.name!r} has {len(tokens)} {what}s for {len(clips)} {split} videos: give each video one"
                )
            bad = (tokens < 0) | (tokens >= len(self.vocabulary))
            if bad.any():
                clip = int(bad.flatten(1).any(1).nonzero()[0]) if tokens.dim() > 1 else int(bad.nonzero()[0])
                raise DataError(
                    f"the {what} of {split} clip {clip} of {self.name!r} has token {int(tokens[bad][0])}, which is"
                    f" outside the vocabulary of {len(self.vocabulary)} words"
                )

    def words(self, tokens: Sequence[int] | Tensor) -> str:
        """Return the text of tokens up to the first `END`, without special ones."""
        found = []
        for token in torch.as_tensor(tokens).tolist():
            if token == END:
                break
            if token >= len(SPECIAL):
                found.append(self.vocabulary[token])
        return " ".join(found)


class MovingDigitsOptions(Options):
    """Options of `moving_digits`.

    Attributes:
        num_train: clips for training.
        num_pools: pools of 120 test clips, one of every caption.
        num_steps: frames in which a digit moves in the first direction, and as many in the second one.
        step: pixels of each.
        side: pixels of a frame's side.
    """

    num_train: int = Field(2400, ge=1)
    num_pools: int = Field(2, ge=1)
    num_steps: int = Field(2, ge=1, le=8)
    step: int = Field(2, ge=1, le=8)
    side: int = Field(16, ge=10, le=64)


@takes(MovingDigitsOptions)
def moving_digits(options: Mapping[str, Any]) -> ClipData:
    """Scikit-learn's handwritten digits that move in one direction, then in another: ``a five moves left then up``.

    Real images, of which those for testing are others than those for training (see `digits`), at a random place from
    which they stay inside the frame. There are 120 captions, of ten digits and twelve pairs of directions, and three
    questions: which digit moves, and where first and last.

    Args:
        options: see `MovingDigitsOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: the digit would leave the frame.
    """
    chosen = parse_options(MovingDigitsOptions, options, WHERE)
    room, far = chosen.side - SIDE, 2 * chosen.num_steps * chosen.step
    if far - chosen.num_steps * chosen.step > room:
        raise DataError(
            f"{WHERE}: a digit of {SIDE} pixels that moves {chosen.num_steps} x {chosen.step} pixels each way leaves a"
            f" frame of {chosen.side}: give a side of {SIDE + far - chosen.num_steps * chosen.step} at least"
        )
    texts = [f"a {digit} moves {first} then {last}" for digit in DIGITS for first, last in MOTIONS]
    known = sorted({word for text in (*texts, *QUESTIONS) for word in text.split()})
    vocabulary = (*SPECIAL, *known)
    images = digits({})
    train = np.arange(chosen.num_train, dtype=np.int64) % len(texts)
    train = rng.generator(0, "moving-digits-order").permutation(train)
    test = np.tile(np.arange(len(texts), dtype=np.int64), chosen.num_pools)
    make = _Maker(chosen, texts, vocabulary)
    return ClipData(
        name="moving-digits",
        train=make(train, images.train_images, images.train_labels, "train"),
        test=make(test, images.test_images, images.test_labels, "test"),
        vocabulary=vocabulary,
        num_labels={"digit": len(DIGITS), "motion": len(MOTIONS)},
        partition_label="digit",
        pool=len(texts),
        mean=0.1,
        std=0.25,
        label_words={"digit": DIGITS},
    )


@dataclass(frozen=True)
class _Maker:
    """Makes clips of captions."""

    options: MovingDigitsOptions
    texts: list[str]
    vocabulary: tuple[str, ...]

    def __call__(self, kind: NDArray[np.int64], images: Any, labels: Tensor, split: str) -> Clips:
        """Return a clip of each caption number in `kind`, of images uint8 [*, 1, 8, 8] of the captions' digits."""
        digit, motion = kind // len(MOTIONS), kind % len(MOTIONS)
        source = rng.generator(0, f"moving-digits-{split}")
        members = [np.flatnonzero(labels.numpy() == number) for number in range(len(DIGITS))]
        chosen = np.array([source.choice(members[number]) for number in digit])
        paths = np.array([self._path(MOTIONS[number]) for number in range(len(MOTIONS))])[motion]
        room = self.options.side - SIDE - (paths.max(1) - paths.min(1))
        paths = paths - paths.min(1, keepdims=True) + source.integers(0, room + 1)[:, None]
        pixels = (images.to(torch.int32) * 255 // 16).to(torch.uint8)[torch.from_numpy(chosen)]
        captions = encoded([self.texts[number] for number in kind], self.vocabulary)
        questions = encoded(QUESTIONS, self.vocabulary).expand(len(kind), -1, -1)
        words = [(DIGITS[d], *MOTIONS[m]) for d, m in zip(digit.tolist(), motion.tolist(), strict=True)]
        return Clips(
            self._drawn(pixels, paths),
            captions,
            questions.contiguous(),
            torch.tensor([[self.vocabulary.index(word) for word in answers] for answers in words]),
            {"digit": torch.from_numpy(digit), "motion": torch.from_numpy(motion)},
        )

    def _path(self, motion: tuple[str, str]) -> NDArray[np.int64]:
        """Return the place in each frame relative to that in the first one, int64 [frames, 2]."""
        moves = [DIRECTIONS[direction] for direction in motion for _ in range(self.options.num_steps)]
        return np.cumsum([(0, 0), *moves], axis=0) * self.options.step

    def _drawn(self, pixels: Tensor, paths: NDArray[np.int64]) -> Tensor:
        """Return videos uint8 [N, frames, 1, side, side] of images [N, 1, 8, 8] at places int64 [N, frames, 2]."""
        count, frames = paths.shape[:2]
        video = torch.zeros(count, frames, 1, self.options.side, self.options.side, dtype=torch.uint8)
        within, where = torch.arange(SIDE), torch.from_numpy(paths)
        rows = (where[..., 0, None] + within)[..., :, None]
        columns = (where[..., 1, None] + within)[..., None, :]
        clip, frame = torch.arange(count)[:, None, None, None], torch.arange(frames)[None, :, None, None]
        video[clip, frame, 0, rows, columns] = pixels[:, 0, None].expand(-1, frames, -1, -1)
        return video


def encoded(texts: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    """Return tokens int64 [texts, longest + 2] of texts of words: `BEGIN`, the words, `END`, then `PAD`.

    Raises:
        DataError: a word is not in the vocabulary.
    """
    number = {word: token for token, word in enumerate(vocabulary)}
    rows = []
    for text in texts:
        unknown = next((word for word in text.split() if word not in number), None)
        if unknown is not None:
            raise DataError(f"the text {text!r} has the word {unknown!r}, which the vocabulary lacks")
        rows.append([BEGIN, *(number[word] for word in text.split()), END])
    length = max(map(len, rows))
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
