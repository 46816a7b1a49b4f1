"""Which caption belongs to which video: files of MSR-VTT, Something-Something v2, JSON lines and tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import DataError

TRAIN, TEST, UNSAID = "train", "test", ""


class Caption(NamedTuple):
    """A caption of a video.

    Attributes:
        where: file and line, or number of the entry, for errors.
        video: path of the video in the folder of all of them.
        text: the caption.
        split: ``"train"``, ``"test"``, another one, or "", which leaves it to a draw.
        label: class of the video; 0 where there are none.
    """

    where: str
    video: str
    text: str
    split: str = UNSAID
    label: int = 0


def read_captions(path: str) -> list[Caption]:
    """Read captions of one's own.

    Args:
        path: ``.jsonl``, an object a line, or ``.csv`` with names of columns in its first line. Each row has ``video``
            and ``caption``, and may have ``split`` (``train`` or ``test``) and ``label``, a number from 0.

    Raises:
        DataError: the file is missing, or a line is malformed.
    """
    rows = _rows_of_table(path) if path.endswith(".csv") else _rows_of_lines(path)
    return _read(rows, path, _own_caption)


def _own_caption(where: str, row: Mapping[str, Any]) -> Caption:
    split = str(row.get("split") or UNSAID)
    if split not in (TRAIN, TEST, UNSAID):
        raise ValueError(f"the split {split!r} is neither {TRAIN!r} nor {TEST!r}")
    return Caption(where, _text(row, "video"), _text(row, "caption"), split, int(row.get("label") or 0))


def read_msr_vtt(path: str) -> list[Caption]:
    """Read MSR-VTT's JSON (Xu et al., CVPR 2016): ``videos`` with a split and a category, and ``sentences`` of them.

    The video ``video7`` is the file ``video7.mp4``. Splits are ``train``, ``validate`` and ``test``.

    Raises:
        DataError: the file is missing or malformed, or a sentence is of no video.
    """
    content = _json_of(path)
    try:
        entries, sentences = content["videos"], content["sentences"]
        videos = {str(one["video_id"]): (str(one["split"]), int(one.get("category", 0))) for one in entries}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(repr(path), "MSR-VTT", error) from None
    if not isinstance(sentences, list):
        raise DataError(f"{path!r} is not of MSR-VTT: its sentences are no list")

    def caption(where: str, row: Mapping[str, Any]) -> Caption:
        """Read a sentence."""
        name = _text(row, "video_id")
        if name not in videos:
            raise ValueError(f"its videos lack {name!r}")
        return Caption(where, _file(name, ".mp4"), _text(row, "caption"), *videos[name])

    rows = [(f"sentence {number} of {path!r}", row) for number, row in enumerate(sentences, start=1)]
    return _read(rows, path, caption)


def read_something(path: str, labels: str | None, split: str) -> list[Caption]:
    """Read a JSON file of Something-Something v2 (Goyal et al., arXiv 1706.04261): a list of objects with id and label.

    The video 78687 is the file ``78687.webm``, its caption the ``label``; its class is that of the ``template``,
    without brackets, in the file of classes.

    Args:
        path: such as ``something-something-v2-train.json``.
        labels: ``something-something-v2-labels.json``, ``{template: number}``; None: there are no classes.
        split: to which all of it belongs.

    Raises:
        DataError: a file is missing or malformed, or a template is none of the classes.
    """
    content = _json_of(path)
    if not isinstance(content, list):
        raise DataError(f"{path!r} is not of Something-Something v2: it is no list")
    try:
        classes = None if labels is None else {str(name): int(number) for name, number in _json_of(labels).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise _malformed(repr(labels), "the classes of Something-Something v2", error) from None

    def caption(where: str, row: Mapping[str, Any]) -> Caption:
        """Read an entry."""
        label = 0
        if classes is not None:
            template = _text(row, "template").replace("[", "").replace("]", "")
            if template not in classes:
                raise ValueError(f"{labels!r} lacks the template {template!r}")
            label = classes[template]
        return Caption(where, _file(_text(row, "id"), ".webm"), _text(row, "label"), split, label)

    rows = [(f"entry {number} of {path!r}", row) for number, row in enumerate(content, start=1)]
    return _read(rows, path, caption)


def _read(rows: list[tuple[str, Any]], path: str, read: Callable[[str, Mapping[str, Any]], Caption]) -> list[Caption]:
    """Read each row, which comes with what names it.

    Raises:
        DataError: one of them is malformed, or there are none.
    """
    found = list[Caption]()
    for where, row in rows:
        try:
            one = read(where, row)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise _malformed(where, "a caption and its video", error) from None
        if not one.text.strip() or not one.video.strip():
            raise DataError(f"{where} has no {'caption' if one.video.strip() else 'video'}: add it, or drop the entry")
        if one.label < 0:
            raise DataError(f"{where} has the label {one.label}: give a number from 0")
        found.append(one)
    if not found:
        raise DataError(f"{path!r} holds no captions: add some")
    return found


def _text(row: Mapping[str, Any], key: str) -> str:
    """Return a value of a row as text.

    Raises:
        KeyError: it has none.
    """
    if row[key] is None:
        raise KeyError(key)
    return str(row[key])


def _file(name: str, suffix: str) -> str:
    """Return the file of a video; "" of an empty name."""
    return name + suffix if name.strip() else ""


def _malformed(where: str, what: str, error: Exception) -> DataError:
    reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{where} is not {what} ({reason}): correct it")


def _text_of(path: str) -> str:
    """Return the text of a file.

    Raises:
        DataError: it is missing or no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(f"cannot read captions from {path!r} ({reason}): correct its path") from None


def _json_of(path: str) -> Any:
    try:
        return json.loads(_text_of(path))
    except ValueError as error:
        raise DataError(f"{path!r} is no JSON file ({error}): fetch it again") from None


def _rows_of_lines(path: str) -> list[tuple[str, Any]]:
    found = list[tuple[str, Any]]()
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        where = f"line {number} of {path!r}"
        try:
            found += [(where, json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise DataError(f"{where} is no JSON object ({error}): correct it") from None
    return found


def _rows_of_table(path: str) -> list[tuple[str, Any]]:
    reader = csv.DictReader(_text_of(path).splitlines(keepends=True))
    try:
        return [(f"line {reader.line_num} of {path!r}", row) for row in reader]
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {path!r} is no row of a table ({error}): correct it") from None
