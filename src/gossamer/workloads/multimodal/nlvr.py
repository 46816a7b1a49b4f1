"""NLVR: is a sentence true of a picture of three boxes?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import DataError
from gossamer.options import Options, parse_options, takes
from gossamer.workloads.datasets import WHERE
from gossamer.workloads.multimodal.splits import MultimodalData, MultimodalSplit
from gossamer.workloads.multimodal.tokens import CaptionTokenizer, TokenizerOptions, tokenizer_of
from gossamer.workloads.multimodal.zips import ZippedImages
from gossamer.workloads.samples import LazySamples, passed

FOLDER, IMAGES = "nlvr", "nlvr_images.zip"  # below $GOSSAMER_DATA
LABELS = {"false": 0, "true": 1}
NUM_IMAGES = 6  # of each sentence: the same boxes in another order
KINDS = {
    "yellow": "Yellow",
    "black": "Black",
    "blue": "#0099ff",
    "circle": "circle",
    "square": "square",
    "triangle": "triangle",
}
MOST_OBJECTS = 24  # of a picture


Part = Literal["dev", "test", "hidden"]


class NlvrOptions(Options):
    """Options of `nlvr`.

    Attributes:
        train, test: which of the files ``dev``, ``test`` and ``hidden`` are for training, and which for testing.
        images: how many of the six images of a sentence are used.
        height, width: to which images of 100 x 400 pixels are resized.
        length: tokens of a sentence, its begin and end included; longer ones are cut.
        tokenizer: it is trained on the training sentences.
    """

    train: list[Part] = ["dev", "hidden"]
    test: list[Part] = ["test"]
    images: int = Field(NUM_IMAGES, ge=1, le=NUM_IMAGES)
    height: Annotated[int, Field(ge=1)] = 50
    width: Annotated[int, Field(ge=1)] = 200
    length: int = Field(32, ge=3)
    tokenizer: TokenizerOptions = TokenizerOptions()


class Statement(NamedTuple):
    """A sentence and what it is said of.

    Attributes:
        where: file and line, for errors.
        sentence: the text.
        label: 1: it is true.
        prompt: number of the task that its writer had; its four pictures have the same number.
        images: names of its images.
    """

    where: str
    sentence: str
    label: int
    prompt: int
    images: tuple[str, ...]


@takes(NlvrOptions)
def nlvr(options: Mapping[str, Any]) -> MultimodalData:
    """Sentences people wrote about pictures, and whether they are true (Suhr et al., ACL 2017; CC BY 4.0).

    Modalities are ``image``, uint8 [3, height, width], read from the zip file when they are needed, and ``text``, int64
    [length], tokens, 0 where the sentence has ended. Labels are 1 where it is true, and 0. A sample's owner is the
    prompt that the sentence was written for. Files are ``$GOSSAMER_DATA/nlvr/{dev,test,hidden}.jsonl`` and
    ``nlvr_images.zip``: 2,964 sentences, each with six images of the same boxes in another order.

    Args:
        options: see `NlvrOptions`.

    Raises:
        ConfigError: an unknown or wrong option.
        DataError: files are missing or malformed, or a sentence's image is missing.
    """
    chosen = parse_options(NlvrOptions, options, WHERE)
    if both := set(chosen.train) & set(chosen.test):
        raise DataError(f"{WHERE} has {min(both)!r} in train and in test: name each file once")
    folder = folder_of_data()
    train, test = ([one for name in names for one in read_statements(folder / f"{name}.jsonl", name, chosen.images)]
                   for names in (chosen.train, chosen.test))  # fmt: skip
    names = [image for one in (*train, *test) for image in one.images]
    source = ZippedImages(str(folder / IMAGES), names, (chosen.height, chosen.width))
    held = source.held()
    source.forget()
    for one in (*train, *test):
        if missing := [image for image in one.images if image not in held]:
            raise DataError(f"{one.where} has an image {missing[0]!r}, which {source.path!r} lacks: fetch it again")
    images = LazySamples(source, torch.arange(len(names)), (3, *source.size), torch.uint8, "")
    digest = passed(images, lambda: _digest(chosen, folder))
    images = LazySamples(source, images.rows, images.sample_shape, images.dtype, digest)
    tokenizer = tokenizer_of(chosen.tokenizer, [one.sentence for one in train])
    count = len(train) * chosen.images
    parts = images.subset(torch.arange(count)), images.subset(torch.arange(count, len(names)))
    first, second = (_split(*pair, tokenizer, chosen) for pair in zip((train, test), parts, strict=True))
    return MultimodalData("nlvr", first, second, len(LABELS), tokenizer.vocabulary)


def _split(
    statements: Sequence[Statement], images: LazySamples, tokenizer: CaptionTokenizer, options: NlvrOptions
) -> MultimodalSplit:
    tokens = tokenizer.encode([one.sentence for one in statements], options.length)
    labels, prompts = (torch.tensor([one[place] for one in statements]) for place in (2, 3))
    ids, labels, prompts = (
        one.repeat_interleave(options.images, 0) for one in (torch.from_numpy(tokens.ids), labels, prompts)
    )
    return MultimodalSplit({"image": images, "text": ids}, torch.ones(len(ids), 2).bool(), labels, prompts)


def folder_of_data() -> Path:
    """Return the folder of the files.

    Raises:
        DataError: there is no such folder.
    """
    root = os.environ.get("GOSSAMER_DATA")
    if not root:
        raise DataError(f"data set 'nlvr' is read from $GOSSAMER_DATA/{FOLDER}: set GOSSAMER_DATA to its folder")
    return Path(root) / FOLDER


def read_statements(path: Path, split: str, num_images: int) -> list[Statement]:
    """Read a file of sentences.

    Args:
        path: a JSON object a line, with identifier, sentence and label.
        split: begins the names of its images, such as ``dev-1572-0-5.png``.
        num_images: how many of each sentence are named.

    Raises:
        DataError: the file is missing, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(
            f"cannot read {str(path)!r} for data set 'nlvr' ({reason}): put it there, or set GOSSAMER_DATA"
        ) from None
    found = list[Statement]()
    for number, line in enumerate(lines, start=1):
        where = f"line {number} of {str(path)!r}"
        try:
            entry = json.loads(line)
            identifier, sentence, label = (str(entry[key]) for key in ("identifier", "sentence", "label"))
            prompt = int(identifier.partition("-")[0])
            truth = LABELS[label.lower()]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{where} is no sentence of NLVR ({type(error).__name__}: {error}): fetch the file again"
            ) from None
        images = tuple(f"{split}-{identifier}-{order}.png" for order in range(num_images))
        found.append(Statement(where, sentence, truth, prompt, images))
    if not found:
        raise DataError(f"{str(path)!r} holds no sentences: fetch the file again")
    return found


def count_objects(path: Path) -> Tensor:
    """Return how many objects of each of `KINDS` the picture of each line shows, int64 [lines, kinds].

    Args:
        path: a file of sentences, see `read_statements`, whose lines list the objects of each box as structured_rep.

    Raises:
        DataError: a line does not, or lists more than `MOST_OBJECTS` in all.
    """
    found = list[list[int]]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            objects = [one for box in json.loads(line)["structured_rep"] for one in box]
            looks = [{str(one["color"]), str(one["type"])} for one in objects]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"line {number} of {str(path)!r} lists no objects ({type(error).__name__}: {error}): set objects to"
                " false, or fetch the file again"
            ) from None
        if len(looks) > MOST_OBJECTS:
            raise DataError(
                f"line {number} of {str(path)!r} lists {len(looks)} objects, more than {MOST_OBJECTS}: set objects to"
                " false"
            )
        found.append([sum(kind in look for look in looks) for kind in KINDS.values()])
    return torch.tensor(found)


def _digest(options: NlvrOptions, folder: Path) -> str:
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for name in (*(f"{one}.jsonl" for one in (*options.train, *options.test)), IMAGES):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
