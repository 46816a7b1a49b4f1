from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Compression]
    ZSTD: _ClassVar[Compression]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNKNOWN: _ClassVar[Outcome]
    TAKEN: _ClassVar[Outcome]
    DUPLICATE: _ClassVar[Outcome]
    DROPPED: _ClassVar[Outcome]
NONE: Compression
ZSTD: Compression
UNKNOWN: Outcome
TAKEN: Outcome
DUPLICATE: Outcome
DROPPED: Outcome

class Hello(_message.Message):
    __slots__ = ("version", "instance", "body")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    version: int
    instance: str
    body: bytes
    def __init__(self, version: _Optional[int] = ..., instance: _Optional[str] = ..., body: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session", "body", "server")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    session: str
    body: bytes
    server: str
    def __init__(self, session: _Optional[str] = ..., body: _Optional[bytes] = ..., server: _Optional[str] = ...) -> None: ...

class Address(_message.Message):
    __slots__ = ("run", "round", "phase", "sender", "attempt")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    phase: int
    sender: int
    attempt: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., phase: _Optional[int] = ..., sender: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("address", "kind", "body", "arrays", "num_bytes", "compression")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    address: Address
    kind: str
    body: bytes
    arrays: bytes
    num_bytes: int
    compression: Compression
    def __init__(self, address: _Optional[_Union[Address, _Mapping]] = ..., kind: _Optional[str] = ..., body: _Optional[bytes] = ..., arrays: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., compression: _Optional[_Union[Compression, str]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("header", "chunk", "sha256", "welcome")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    chunk: bytes
    sha256: bytes
    welcome: Welcome
    def __init__(self, header: _Optional[bytes] = ..., chunk: _Optional[bytes] = ..., sha256: _Optional[bytes] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("outcome", "reason")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    reason: str
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ...) -> None: ...
