"""Captions as numbers: a tokenizer of the library ``tokenizers``, trained on captions or loaded from a file.

The library is imported here alone. It is told to use one thread, as a worker does, and captions become arrays when a
data set is loaded, before any process is forked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gossamer.errors import DataError
from gossamer.options import Options

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN, BEGIN, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's names


class TokenizerOptions(Options):
    """Options of a tokenizer.

    Attributes:
        kind: ``"words"``, a token a word or sign, or ``"bpe"``, byte-pair encoding: parts of words (arXiv 1508.07909).
        max_tokens: most tokens of the vocabulary, the five special ones included; the commonest are kept.
        path: file that `CaptionTokenizer.save`, or ``save`` of the library, has written; `kind` and `max_tokens` are
            then those of the file.
    """

    kind: Literal["words", "bpe"] = "words"
    max_tokens: Annotated[int, Field(ge=len(SPECIAL) + 1)] = 1000
    path: str | None = None


class Tokens(NamedTuple):
    """Captions as numbers.

    Attributes:
        ids: int64 [N, length].
        is_token: bool [N, length], false where a caption has ended and `ids` are padding.
    """

    ids: NDArray[np.int64]
    is_token: NDArray[np.bool_]


class CaptionTokenizer:
    """Turns captions into numbers and back.

    Attributes:
        num_tokens: size of the vocabulary; numbers are below it.
        padding, unknown, begin, end, mask: numbers of the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, where: str) -> None:
        """Take over a tokenizer of the library.

        Args:
            tokenizer: it.
            where: where it comes from, for errors.

        Raises:
            DataError: it lacks one of the special tokens.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [name for name in SPECIAL if name not in vocabulary]
        if missing:
            raise DataError(
                f"the tokenizer of {where} has no token {missing[0]!r}: add {', '.join(SPECIAL)} as special tokens"
            )
        self.padding, self.unknown, self.begin, self.end, self.mask = (vocabulary[name] for name in SPECIAL)
        self.num_tokens = 1 + max(vocabulary.values())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    def encode(self, captions: Sequence[str], length: int) -> Tokens:
        """Return each caption between the tokens of begin and end, cut so that the latter remains.

        Args:
            captions: texts.
            length: numbers in a row, at least 3.

        Raises:
            DataError: the length is below 3.
        """
        if length < 3:
            raise DataError(f"captions of {length} tokens hold no word between their begin and end: give 3 or more")
        ids = np.full((len(captions), length), self.padding, dtype=np.int64)
        is_token = np.zeros(ids.shape, dtype=np.bool_)
        found = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        for row, encoding in enumerate(found):
            numbers = [self.begin, *encoding.ids[: length - 2], self.end]
            ids[row, : len(numbers)] = np.array(numbers, dtype=np.int64)
            is_token[row, : len(numbers)] = True
        return Tokens(ids, is_token)

    def decode(self, ids: NDArray[np.int64]) -> list[str]:
        """Return the text of each row up to its token of end, without special tokens.

        Args:
            ids: int64 [N, length].

        Raises:
            DataError: a number is outside the vocabulary.
        """
        check_tokens(ids, self.num_tokens, "tokens to be decoded")
        ends = np.where((ids == self.end).any(axis=1), (ids == self.end).argmax(axis=1), ids.shape[1])
        rows = [row[:end].tolist() for row, end in zip(ids, ends, strict=True)]
        return list(self._tokenizer.decode_batch(rows, skip_special_tokens=True))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Tokens by their numbers."""
        return tuple(self.words(range(self.num_tokens)))

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of these numbers, special ones included; UNKNOWN for a number that has none."""
        return [self._tokenizer.id_to_token(number) or UNKNOWN for number in ids]

    def to_json(self) -> str:
        """Return all of it as JSON of the library, the same for equal tokenizers."""
        return self._tokenizer.to_str()

    def save(self, path: str | Path) -> None:
        """Write it into a JSON file, for `TokenizerOptions.path`.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write the tokenizer {str(path)!r} ({error.strerror}): give another path") from None


def tokenizer_of(options: TokenizerOptions, captions: Iterable[str]) -> CaptionTokenizer:
    """Return the tokenizer of a file, or one that is trained on captions, the same whatever their order.

    Args:
        options: see `TokenizerOptions`.
        captions: texts to train on, those of the training split alone.

    Raises:
        DataError: the file is missing or no tokenizer, or there are no words to train on.
    """
    return _trained(options, captions) if options.path is None else _loaded(options.path)


def _trained(options: TokenizerOptions, captions: Iterable[str]) -> CaptionTokenizer:
    """Train a tokenizer of small letters, without accents.

    Raises:
        DataError: there are no words.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    texts, special = sorted(captions), list(SPECIAL)
    if not any(text.strip() for text in texts):
        raise DataError("the training captions hold no words, so no tokenizer can be trained on them: give some")
    trainer: trainers.Trainer
    if options.kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordLevelTrainer(vocab_size=options.max_tokens, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=options.max_tokens,
            special_tokens=special,
            limit_alphabet=options.max_tokens - len(special),
            show_progress=False,
        )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.train_from_iterator(texts, trainer)
    return CaptionTokenizer(tokenizer, "the captions")


def _loaded(path: str) -> CaptionTokenizer:
    """Load a tokenizer from a JSON file of the library.

    Raises:
        DataError: it is missing or malformed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(f"cannot read the tokenizer {path!r} ({reason}): correct its path") from None
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises the bare class
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path!r} is no tokenizer of the library tokenizers ({reason}): save it again") from None
    return CaptionTokenizer(tokenizer, repr(path))


def check_tokens(ids: NDArray[np.int64], num_tokens: int, where: str) -> None:
    """Refuse numbers outside a vocabulary.

    Args:
        ids: int64 [N, length].
        num_tokens: size of the vocabulary.
        where: what they are, for errors.

    Raises:
        DataError: one of them is.
    """
    wrong = np.argwhere((ids < 0) | (ids >= num_tokens))
    if len(wrong):
        row, place = wrong[0]
        raise DataError(
            f"{where} have the id {ids[row, place]} in row {row}, place {place}, outside 0 .. {num_tokens - 1}: encode"
            " the captions by the tokenizer that the model was built for"
        )
