"""What a command may import that a file names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Trust = Annotated[bool, typer.Option("--trust", help="Import whatever code the file names; without it: plug-ins only.")]


@contextmanager
def plug_ins(trust: bool, own: bool = True) -> Iterator[None]:
    """Say what is imported, before it is; find modules in the working folder, too, after all others.

    Args:
        trust: whether any code may be imported that a file names, see `gossamer.registry`.
        own: whether modules that are not installed may be imported.
    """
    from gossamer.registry import errors_of_plug_ins, importing, trusting

    folders = [os.getcwd()] if own and os.getcwd() not in sys.path else []
    sys.path += folders
    try:
        with importing(lambda sentence: typer.echo(sentence, err=True), own), trusting(trust), errors_of_plug_ins():
            yield
    finally:
        for folder in folders:
            sys.path.remove(folder)
