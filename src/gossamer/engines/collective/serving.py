"""What the ranks do that do not lead: rebuild each task, and handle what the leader sends."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor

from gossamer.distributed.links import GroupBroken
from gossamer.engines.collective.agreement import require_same
from gossamer.engines.collective.clients import ClientRank
from gossamer.engines.collective.environment import is_leader
from gossamer.engines.collective.group import TIMEOUT_SECONDS, Group, Message
from gossamer.engines.collective.peer_rank import PeerRank
from gossamer.engines.collective.world import Handler, Letter, leading
from gossamer.engines.recipe import rebuild
from gossamer.errors import GossamerError
from gossamer.profiling import recorder
from gossamer.registry import errors_of_plug_ins
from gossamer.workloads.samples import telling

T = TypeVar("T")


def on_all_ranks(lead: Callable[[], T], known: Callable[[], Mapping[str, Any]], stop: Callable[[], bool]) -> T | None:
    """Do something that uses all ranks of this torchrun job, if it is one; otherwise just do it.

    Args:
        lead: what rank 0 does.
        known: returns JSON values of which all ranks must have the same.
        stop: asked whether this rank was asked to stop; the leader then stops all.

    Returns:
        what `lead` returns; on the other ranks None, once that is done.

    Raises:
        ConfigError: ranks differ in what they know, or in their versions of gossamer, torch or Python.
        GroupBroken: a rank is gone, or did not answer in time.
        SystemExit: rank 0 ended with an error, which it tells.
    """

    def described() -> dict[str, str]:
        """Return what is compared."""
        text = json.dumps(known(), sort_keys=True, default=lambda value: type(value).__name__)
        versions = {"gossamer": version("gossamer"), "torch": torch.__version__, "Python": platform.python_version()}
        return {"configuration": hashlib.sha256(text.encode()).hexdigest()[:16]} | versions

    if not is_leader():
        serve(described, stop)
        return None
    with leading(described), errors_of_plug_ins():
        return lead()


def serve(describe: Callable[[], Mapping[str, Any]], stop: Callable[[], bool]) -> None:
    """Handle what rank 0 sends, until it dismisses this rank.

    Args:
        describe: returns what this rank knows of the run, see `World.compare`.
        stop: asked whether this rank was asked to stop; the leader then stops all.

    Raises:
        GroupBroken: a rank is gone, or did not answer in time.
        SystemExit: rank 0 ended with an error, which it tells.
    """
    group = Group.of_environment()
    handler: Handler | None = None
    told, reply = False, Letter({})
    with closing(group):
        while True:
            try:
                message, arrays = group.receive(0, TIMEOUT_SECONDS)  # which may be planning or committing
            except GroupBroken:
                if "error" in reply.message:  # which rank 0 tells, and has ended by now
                    sys.exit(reply.message["exit_code"])
                raise
            if message["kind"] == "end":
                if message["exit_code"]:
                    sys.exit(message["exit_code"])
                return
            try:
                if message["kind"] == "compare":
                    reply = Letter({"described": dict(describe())})
                elif message["kind"] == "see":
                    reply = Letter({"seen": os.path.exists(message["path"])})
                elif message["kind"] == "begin":
                    handler, reply = None, Letter({})  # memory of the one before is free
                    recorder.start_there(message["trace"], "rank")
                    handler = handler_of(message, group)
                elif message["kind"] == "close":
                    handler, reply = None, Letter({})
                    recorder.stop()
                else:
                    assert handler is not None, "rank 0 begins with a task"
                    with errors_of_plug_ins():
                        reply = handler.handle(message, arrays)
            except GroupBroken:
                raise
            except GossamerError as error:
                reply = Letter({"error": str(error), "exit_code": error.exit_code})
            group.send(0, reply.message | {"stop": stop() and not told}, reply.arrays)()
            recorder.flush()
            told = told or stop()


def handler_of(message: Message, group: Group) -> Handler:
    """Return what handles the messages of an engine on this rank."""
    with telling(message.get("passes", ())):
        task = rebuild(message["recipe"])
    require_same(task, message["task"])
    group.limit(message["timeout_seconds"])
    if task.topology is not None:
        return PeerRank(task, group, message["spans"], message["bounds"])
    return ClientRank(task, group, dict[str, Tensor](), dict[str, Tensor](), message["store"])
