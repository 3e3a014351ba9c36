"""Ctrl-C and SIGTERM as an exception, which can be put off while something that must not be left half done runs."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """One of SIGNALS came; its number is the second argument."""


def raise_stopped(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped("interrupted", number)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], object], numbers: Iterable[int]) -> Iterator[None]:
    """`handler` handles the signals of these numbers while the block runs."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def signals_as_exceptions() -> contextlib.AbstractContextManager[None]:
    """SIGNALS raise Stopped while the block runs, but for those that are ignored, as in a shell's background."""
    return handled(raise_stopped, [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN])


def ignore() -> None:
    """SIGNALS have no effect from here on, within `signals_as_exceptions`: the script ends already, and says why."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """SIGNALS that arrive while the block runs take effect when it is done, or has failed."""
    came, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # no other gets signals, nor may it handle them
        handlers = {n: handler for n in SIGNALS if callable(handler := signal.getsignal(n))}
    try:
        with handled(lambda *arguments: came.append(arguments), handlers):
            yield
    finally:
        for number, frame in came[:1]:
            handlers[number](number, frame)
