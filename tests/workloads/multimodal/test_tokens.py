"""Captions to numbers and back, with both kinds of tokenizers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import DataError
from gossamer.workloads.multimodal.tokens import SPECIAL, CaptionTokenizer, TokenizerOptions, check_tokens, tokenizer_of

CAPTIONS = ["The five moves left, then up.", "the seven moves right", "the seven stays"]
KINDS = pytest.mark.parametrize("kind", ["words", "bpe"])


def made(kind: str = "words", max_tokens: int = 60, captions: Sequence[str] = CAPTIONS) -> CaptionTokenizer:
    return tokenizer_of(TokenizerOptions(kind=kind, max_tokens=max_tokens), captions)


def test_words_are_numbered_by_how_common_they_are() -> None:
    tokenizer = made()
    assert tokenizer.words(range(9)) == [*SPECIAL, "the", "moves", "seven", ","]  # equally common: by the alphabet
    tokens = tokenizer.encode(["The seven flies"], 6)
    np.testing.assert_array_equal(tokens.ids, [[tokenizer.begin, 5, 7, tokenizer.unknown, tokenizer.end, 0]])
    np.testing.assert_array_equal(tokens.is_token, [[True] * 5 + [False]])
    assert tokens.ids.dtype == np.int64


@KINDS
def test_there_and_back(kind: str) -> None:
    tokenizer = made(kind)
    tokens = tokenizer.encode(CAPTIONS, 60)
    decoded = [text.replace(" ", "") for text in tokenizer.decode(tokens.ids)]
    assert decoded == [text.lower().replace(" ", "") for text in CAPTIONS]
    assert (tokens.ids[~tokens.is_token] == tokenizer.padding).all()


@KINDS
def test_long_captions_keep_their_end(kind: str) -> None:
    tokenizer = made(kind)
    tokens = tokenizer.encode(CAPTIONS, 4)
    assert tokens.is_token.all()
    assert (tokens.ids[:, 0] == tokenizer.begin).all()
    assert (tokens.ids[:, -1] == tokenizer.end).all()
    with pytest.raises(DataError, match=r"captions of 2 tokens hold no word"):
        tokenizer.encode(CAPTIONS, 2)


@KINDS
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(CAPTIONS))
def test_the_order_of_captions_changes_nothing(kind: str, order: list[str]) -> None:
    assert made(kind, captions=order).to_json() == made(kind).to_json()


@KINDS
def test_the_vocabulary_has_an_upper_limit(kind: str) -> None:
    tokenizer = made(kind, max_tokens=8)
    assert tokenizer.num_tokens == 8
    assert tokenizer.encode(CAPTIONS, 80).ids.max() < tokenizer.num_tokens


@KINDS
def test_a_file_holds_all_of_it(kind: str, tmp_path: Path) -> None:
    tokenizer, path = made(kind), tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = tokenizer_of(TokenizerOptions(path=str(path)), [])
    assert again.to_json() == tokenizer.to_json()
    np.testing.assert_array_equal(again.encode(CAPTIONS, 20).ids, tokenizer.encode(CAPTIONS, 20).ids)


def test_text_after_the_end_is_not_read() -> None:
    tokenizer = made()
    seven = tokenizer.encode(["seven"], 3).ids[0, 1]
    assert tokenizer.decode(np.array([[tokenizer.begin, seven, tokenizer.end, seven]])) == ["seven"]


def test_numbers_outside_the_vocabulary_are_refused() -> None:
    tokenizer = made()
    with pytest.raises(DataError, match=rf"have the id 99 in row 1, place 0, outside 0 .. {tokenizer.num_tokens - 1}"):
        tokenizer.decode(np.array([[0, 1], [99, 0]]))
    with pytest.raises(DataError, match=r"captions of the test split have the id -1 in row 0, place 1"):
        check_tokens(np.array([[0, -1]]), 10, "captions of the test split")


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    def load(path: Path) -> None:
        tokenizer_of(TokenizerOptions(path=str(path)), [])

    with pytest.raises(DataError, match=r"cannot read the tokenizer .*No such file"):
        load(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer of the library"):
        load(tmp_path / "a.json")
    content = json.loads(made().to_json())
    content["added_tokens"], vocabulary = [], content["model"]["vocab"]
    vocabulary["<mask>"] = vocabulary.pop("[MASK]")
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has no token '\[MASK\]'"):
        load(tmp_path / "b.json")


@KINDS
def test_captions_without_words_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match=r"hold no words"):
        made(kind, captions=["", " "])
