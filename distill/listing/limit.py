"""Calls that may block for ever, on threads that are left behind: a pipe, a mount whose server is gone.

Nothing can end a thread that stands in ``open``. So such a call gets a thread that hinders no process from ending,
and after a limit the caller goes on without it. The caller waits in a way that signals interrupt.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from distill.errors import StorageError

BLOCKED_IN_A_ROW = 8  # then it is no longer the files: the storage does not answer at all
T = TypeVar("T")
R = TypeVar("R")


class BlockedError(OSError):
    """A call that did not return within its limit; its text is the reason, in a few words."""


class _Thread:
    """A thread that makes one call after the other until it is left behind."""

    def __init__(self) -> None:
        self.calls = SimpleQueue[Callable[[], Any] | None]()
        self.results = SimpleQueue[tuple[Any, BaseException | None]]()
        threading.Thread(target=self._run, daemon=True, name="limited").start()

    def _run(self) -> None:
        while self._make_call():
            pass

    def _make_call(self) -> bool:
        """Waits for one call and makes it; no frame holds the last one meanwhile, and with it the reader that made it."""
        call = self.calls.get()
        if call is None:
            return False
        try:
            self.results.put((call(), None))
        except BaseException as error:  # raised again where the result is awaited
            self.results.put((None, error))
        return True


class LimitedCalls:
    """Makes calls that return within a limit; safe from several threads. Idle threads end with it."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._idle = SimpleQueue[_Thread]()
        weakref.finalize(self, _end_all, self._idle)
        self._num_blocked = 0  # in a row

    def run(self, call: Callable[[], T], path: str) -> T:
        """The result of a call that reads ``path``, or what it raised.

        Raises:
            BlockedError: it has not returned within the limit.
            StorageError: neither have some calls before it.
        """
        thread = self._take()
        thread.calls.put(call)
        try:
            result, error = thread.results.get(timeout=self.limit_s)
        except Empty:
            thread.calls.put(None)  # so that it ends if it ever returns
            self._num_blocked += 1
            text = f"no answer within {self.limit_s:g} s"
            if self._num_blocked >= BLOCKED_IN_A_ROW:
                raise StorageError(
                    f"{path}: {text}, as {self._num_blocked - 1} files before it",
                    fix="Look at the storage: a mount whose server is gone gives no error.",
                ) from None
            raise BlockedError(text) from None
        self._num_blocked = 0
        self._idle.put(thread)
        if error is not None:
            raise error
        value: T = result
        return value

    def _take(self) -> _Thread:
        try:
            return self._idle.get_nowait()
        except Empty:
            return _Thread()


def _end_all(idle: "SimpleQueue[_Thread]") -> None:
    while not idle.empty():
        idle.get().calls.put(None)


def in_order(work: Callable[[T], R], items: Sequence[T], num_threads: int) -> Iterator[R]:
    """The result of ``work`` for each item, in their order; several at a time, and none after an error or a signal.

    As ``ThreadPoolExecutor.map``, which waits for its threads when it is interrupted and when the process ends.
    """
    todo = SimpleQueue[tuple[int, T]]()
    for pair in enumerate(items):
        todo.put(pair)
    boxes = [SimpleQueue[tuple[Any, BaseException | None]]() for _ in items]
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                index, item = todo.get_nowait()
            except Empty:
                return
            try:
                boxes[index].put((work(item), None))
            except BaseException as error:  # raised again in the order of the items
                boxes[index].put((None, error))

    for _ in range(min(num_threads, len(items))):
        threading.Thread(target=run, daemon=True, name="in-order").start()
    try:
        for box in boxes:
            result, error = box.get()
            if error is not None:
                raise error
            yield result
    finally:
        over.set()
