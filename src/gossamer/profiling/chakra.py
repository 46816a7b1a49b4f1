"""Writes a trace as Chakra execution traces, the input of ASTRA-sim: one file for each thread.

A file is a sequence of protobuf messages, each behind its length as a varint: `GlobalMetadata`, then a `Node` for each
piece of work. Of the schema, https://github.com/mlcommons/chakra (et_def.proto, MIT), only the fields stand here that
are written; names and numbers are the format's. It is described in Python, so nothing is compiled.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from gossamer.errors import storage_errors
from gossamer.profiling.exports import pieces_of, ranks_of
from gossamer.profiling.trace import Trace

SCHEMA = "0.0.4"
COMPUTE, SEND, RECEIVE = 4, 5, 6  # NodeType
_PACKAGE = "ChakraProtoMsg"
_FIELDS = {  # name: (number, type, is repeated)
    "AttributeProto": {
        "name": (1, "STRING", False),
        "int32_val": (7, "INT32", False),
        "int64_val": (9, "INT64", False),
        "bool_val": (27, "BOOL", False),
    },
    "GlobalMetadata": {"version": (1, "STRING", False)},
    "Node": {
        "id": (1, "UINT64", False),
        "name": (2, "STRING", False),
        "type": (3, "INT32", False),  # an enumeration, which is sent as an int32
        "ctrl_deps": (4, "UINT64", True),
        "data_deps": (5, "UINT64", True),
        "start_time_micros": (6, "UINT64", False),
        "duration_micros": (7, "UINT64", False),
        "attr": (10, "AttributeProto", True),
    },
}
_ONE_OF = ("int32_val", "int64_val", "bool_val")  # of which an attribute has one


@cache
def messages() -> dict[str, Any]:
    """Return the classes of the schema's messages, by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _FIELDS.items():
        described = file.message_type.add(name=name)
        for field, (number, kind, is_repeated) in fields.items():
            one = described.field.add(name=field, number=number, label=3 if is_repeated else 1)
            if kind in _FIELDS:
                one.type, one.type_name = one.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                one.type = one.Type.Value(f"TYPE_{kind}")
            if field in _ONE_OF:
                one.oneof_index = 0
        if any(field in _ONE_OF for field in fields):
            described.oneof_decl.add(name="value")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _FIELDS}


def write_chakra(trace: Trace, prefix: Path) -> list[Path]:
    """Write ``<prefix>.<rank>.et`` for each thread; microseconds. Waits that a message ended are left out.

    A piece depends on the one before it in its thread. Messages are nodes of no length before the pieces that send and
    receive them, linked by ranks and a tag.

    Returns:
        The files, by ranks.

    Raises:
        StorageError: the disk refuses one.
    """
    known, ranks = messages(), ranks_of(trace)
    nodes: dict[int, list[Any]] = defaultdict(list)

    def add(rank: int, kind: int, name: str, begin: int, length: int, **attributes: int | bool) -> None:
        """Add a node behind the last one of its rank."""
        number = len(nodes[rank])
        node = known["Node"](id=number, name=name, type=kind, start_time_micros=begin, duration_micros=length)
        node.data_deps.extend([number - 1] if number else [])
        for key, value in attributes.items():
            one = node.attr.add(name=key)
            if isinstance(value, bool):
                one.bool_val = value
            elif key == "comm_size":
                one.int64_val = value
            else:
                one.int32_val = value
        nodes[rank].append(node)

    for piece in pieces_of(trace):
        rank, begin, end = (
            ranks[piece.lane],
            round(1e6 * piece.begin),
            round(1e6 * (piece.begin + piece.segment.seconds)),
        )
        if piece.link is not None:
            here, there = ("comm_src", "comm_dst") if piece.link.is_sent else ("comm_dst", "comm_src")
            ends = {here: rank, there: ranks[piece.link.other]}
            kind, what = (SEND, "send") if piece.link.is_sent else (RECEIVE, "receive")
            size, tag = piece.link.num_bytes, piece.link.tag
            add(rank, kind, f"{what} {tag}", begin, 0, comm_size=size, comm_tag=tag, **ends)
        add(rank, COMPUTE, piece.segment.kind, begin, end - begin, is_cpu_op=True)
    return [_write(prefix, rank, nodes[rank]) for rank in ranks.values()]


def _write(prefix: Path, rank: int, nodes: list[Any]) -> Path:
    from google.protobuf.proto import serialize_length_prefixed

    path, output = prefix.with_name(f"{prefix.name}.{rank}.et"), BytesIO()
    for one in (messages()["GlobalMetadata"](version=SCHEMA), *nodes):
        serialize_length_prefixed(one, output)
    with storage_errors(path):
        path.write_bytes(output.getvalue())
    return path
