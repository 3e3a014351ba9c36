"""Ctrl-C and SIGTERM as an exception, which can be deferred during work that must not be interrupted."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """One of SIGNALS was received; its number is the second argument."""


def raise_stopped(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped("interrupted", number)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], object], numbers: Iterable[int]) -> Iterator[None]:
    """Install `handler` for the signals with these numbers while the block runs."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)


def signals_as_exceptions() -> contextlib.AbstractContextManager[None]:
    """Raise Stopped for SIGNALS while the block runs, except for ignored ones, as in a shell's background jobs."""
    return handled(raise_stopped, [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN])


def ignore() -> None:
    """Ignore SIGNALS until the block of `signals_as_exceptions` ends: for a script that is about to exit anyway."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer SIGNALS that arrive while the block runs until it has ended, normally or with an exception."""
    received, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot receive or handle signals
        handlers = {n: handler for n in SIGNALS if callable(handler := signal.getsignal(n))}
    try:
        with handled(lambda *arguments: received.append(arguments), handlers):
            yield
    finally:
        for number, frame in received[:1]:
            handlers[number](number, frame)
