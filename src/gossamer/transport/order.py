"""Which messages are taken: those later than all before, and those that were asked for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from gossamer.errors import Dropped, TransportError
from gossamer.transport.arrays import allocate
from gossamer.transport.messages import Address, Header, Spec

TAKEN_BEFORE = ("duplicate", "stale")  # reasons for which a message is dropped that need not be sent again
_Key = tuple[str, str, int, str]  # node, run, sender, kind
_Order = tuple[int, int, int]


class Busy(TransportError):
    """A message cannot be taken now; it may be sent again."""


class Order:
    """What was applied last of each (node, run, sender, kind); one message of each is applied at a time."""

    def __init__(self, max_senders: int) -> None:
        """Start with nothing.

        Args:
            max_senders: number of (run, sender, kind) of a node.
        """
        self._max_senders = max_senders
        self._last: dict[_Key, _Order] = {}
        self._number: Counter[str] = Counter()
        self._applying: set[_Key] = set()
        self._lock = threading.Lock()

    @contextmanager
    def applying(self, header: Header) -> Iterator[None]:
        """Apply a message within the block; if that raises, it was not applied.

        Raises:
            Dropped: it or a later one was applied before; or there are too many senders.
            Busy: another one of its key is being applied.
        """
        address = header.address
        key = (header.node, address.run, address.sender, header.kind)
        with self._lock:
            last = self._last.get(key)
            if last is not None and address.order <= last:
                raise Dropped("duplicate" if address.order == last else "stale")
            if last is None and self._number[header.node] >= self._max_senders:
                raise Dropped("too many senders")
            if key in self._applying:
                raise Busy("another message of its kind and sender is being received: send it again later")
            self._applying.add(key)
        try:
            yield
            with self._lock:
                self._number[header.node] += key not in self._last
                self._last[key] = address.order
        finally:
            with self._lock:
                self._applying.discard(key)

    def forget(self) -> None:
        """Forget what was applied: who sends has begun anew."""
        with self._lock:
            self._last.clear()
            self._number.clear()


class Expectations:
    """Takes only messages that were asked for: an `Accept`.

    One that nobody expects is dropped as "unexpected"; of other arrays as "wrong arrays". One that may come early, from
    a peer that is a round ahead, is held back unread, by flow control, for some time.
    """

    def __init__(self, hold_seconds: float = 0.0) -> None:
        """Expect nothing.

        Args:
            hold_seconds: for which a message waits to be expected.
        """
        self._hold_seconds = hold_seconds
        self._expected: dict[tuple[str, str, Address], Mapping[str, Tensor | Spec]] = {}
        self._changed = threading.Condition()

    def expect(self, node: str, kind: str, address: Address, arrays: Mapping[str, Tensor | Spec]) -> None:
        """Expect one message.

        Args:
            arrays: contiguous tensors that its arrays are read into, or their dtypes and shapes. Memory that a message
                was read into belongs to who received it: expect another one into it only after that.
        """
        with self._changed:
            self._expected[node, kind, address] = dict(arrays)
            self._changed.notify_all()

    def forget(self, node: str | None = None, before: Address | None = None) -> None:
        """Expect no longer what is of a node (None: of any), and of a run, earlier than `before` (None: all)."""
        with self._changed:
            for key in list(self._expected):
                its_node, _, address = key
                earlier = before is None or (address.run == before.run and address.order < before.order)
                if node in (None, its_node) and earlier:
                    del self._expected[key]

    def __call__(self, header: Header) -> Mapping[str, Tensor] | None:
        """See `gossamer.transport.messages.Accept`."""
        key = header.node, header.kind, header.address
        with self._changed:
            self._changed.wait_for(lambda: key in self._expected, self._hold_seconds)
            if key not in self._expected:
                raise Dropped("unexpected")
            arrays = self._expected[key]
        specs = {
            name: (one.dtype, tuple(one.shape)) if isinstance(one, Tensor) else (one[0], tuple(one[1]))
            for name, one in arrays.items()
        }
        if specs != dict(header.specs):
            raise Dropped("wrong arrays")
        targets = {name: one for name, one in arrays.items() if isinstance(one, Tensor)}
        if not targets:
            return None
        return targets if len(targets) == len(specs) else {**allocate(specs), **targets}
