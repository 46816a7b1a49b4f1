"""Encoders and tokenizers of the library ``transformers``, from local files alone; it is imported here alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigError, one_line
from gossamer.workloads.multimodal.clips import BEGIN, END, MASK, UNKNOWN

NO_PIECE = -1


def load_encoder(folder: str, where: str) -> nn.Module:
    """Return the model of a folder that ``save_pretrained`` has written, frozen, and without dropout.

    Args:
        folder: with ``config.json`` and weights as safetensors; nothing is downloaded, and no code of it is run.
        where: dotted path of the setting, for errors.

    Raises:
        ConfigError: the library or the folder is missing, or the folder holds no model.
    """
    library = _library(folder, where)
    try:
        found: nn.Module = library.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, attn_implementation="eager", dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{where} = {folder!r} holds no model that could be loaded: {one_line(error)}") from None
    return found.eval().requires_grad_(False)


def word_pieces(folder: str, vocabulary: Sequence[str], where: str) -> Tensor:
    """Return the tokens that the tokenizer of a folder makes of each word, int64 [words, most], then `NO_PIECE`.

    Args:
        vocabulary: words of a data set, beginning with the special tokens.

    Raises:
        ConfigError: the library or the tokenizer is missing.
    """
    library = _library(folder, where)
    try:
        tokenizer: Any = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{where} = {folder!r} holds no tokenizer that could be loaded: {one_line(error)}") from None
    found: list[list[int]] = [tokenizer.encode(word, add_special_tokens=False) for word in vocabulary]
    ends = (tokenizer.cls_token_id, tokenizer.bos_token_id), (tokenizer.sep_token_id, tokenizer.eos_token_id)
    special = {BEGIN: ends[0], END: ends[1], UNKNOWN: (tokenizer.unk_token_id,), MASK: (tokenizer.mask_token_id,)}
    found[0] = []  # padding
    for number, known in special.items():
        found[number] = [one for one in known if one is not None][:1]
    pieces = torch.full((len(found), max(map(len, found))), NO_PIECE)
    for row, each in zip(pieces, found, strict=True):
        row[: len(each)] = torch.tensor(each, dtype=torch.int64)
    return pieces


def spelled(tokens: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Return texts int64 [b, n] in the pieces of `word_pieces`, int64 [b, n * most], and which of these there are.

    Those that there are come first.
    """
    found = pieces[tokens].flatten(-2)
    order = (found == NO_PIECE).to(torch.uint8).argsort(dim=-1, stable=True)
    found = found.gather(-1, order)
    there = found != NO_PIECE
    return found.masked_fill(~there, 0), there


def _library(folder: str, where: str) -> Any:
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{where} = {folder!r} is no folder with a config.json: name one that save_pretrained wrote")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{where} needs the library transformers: pip install 'gossamer[hf]' ({error})") from None
    found: Any = transformers
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found
