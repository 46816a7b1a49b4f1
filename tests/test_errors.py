"""Errors that users see: exit codes, hints at the nearest name, and a disk that refuses."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gossamer import errors
from gossamer.errors import (
    ConfigError,
    DataError,
    GossamerError,
    Interrupted,
    StorageError,
    nearest,
    one_line,
    plugin_errors,
    require_attributes,
    storage_errors,
)

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GossamerError)
]  # all that there are


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes(kind: type[GossamerError]) -> None:
    assert kind.exit_code == (130 if kind is Interrupted else 2)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("roling", "; did you mean 'rolling'?"), ("random", "; did you mean 'random'?"), ("xyz", ""), ("", "")],
)
def test_nearest(name: str, hint: str) -> None:
    assert nearest(name, iter(["rolling", "static", "random"])) == hint
    assert nearest(name, []) == ""


class TestPlugins:
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (ValueError("a\n  b"), "ValueError: a b"),
            (KeyError("x"), "KeyError: 'x'"),
            (ZeroDivisionError(), "ZeroDivisionError"),
            (SystemExit(2), "SystemExit: 2"),
        ],
        ids=repr,
    )
    def test_any_error_is_one_line_with_its_place(self, error: BaseException, told: str) -> None:
        assert one_line(error) == told  # raised nowhere
        with pytest.raises(ConfigError) as caught, plugin_errors("model 'my:Own'"):
            raise error
        assert caught.value.__cause__ is error
        line = error.__traceback__.tb_next.tb_lineno  # below plugin_errors itself
        place = f"({__file__}, line {line})"
        assert str(caught.value) == f"model 'my:Own' fails with {told} {place}: correct it, or name another one"

    def test_errors_on_purpose_pass(self) -> None:
        with pytest.raises(DataError, match=r"^no data$"), plugin_errors("model 'my:Own'"):
            raise DataError("no data")
        with pytest.raises(KeyboardInterrupt), plugin_errors("model 'my:Own'"):
            raise KeyboardInterrupt

    @pytest.mark.parametrize(("found", "kind"), [(dict, "dict"), ({}, "dict"), (None, "NoneType")])
    def test_attributes(self, found: object, kind: str) -> None:
        with pytest.raises(ConfigError, match=rf"^model 'x' is a {kind} without layout, loss: correct it, or name"):
            require_attributes("model 'x'", found, ["layout", "__class__", "loss"])
        require_attributes("model 'x'", found, ["__class__"])


class TestStorageErrors:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk(self, number: int) -> None:
        with pytest.raises(StorageError) as caught, storage_errors(Path("some/file")):
            raise OSError(number, "whatever")
        assert str(caught.value).startswith("no space left on the device that holds 'some/file': free some space")
        assert isinstance(caught.value.__cause__, OSError)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [(OSError(errno.EROFS, "Read-only file system"), "Read-only file system"), (OSError("odd"), "odd")],
    )
    def test_a_disk_that_is_not_ours(self, error: OSError, reason: str) -> None:
        with pytest.raises(StorageError) as caught, storage_errors(Path("some/file")):
            raise error
        assert str(caught.value) == f"cannot write 'some/file' ({reason}): check the path and its permissions"

    def test_other_errors_pass(self) -> None:
        with pytest.raises(ZeroDivisionError), storage_errors(Path("some/file")):
            _ = 1 / 0
        with storage_errors(Path("some/file")):
            pass
