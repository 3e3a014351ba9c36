"""Ctrl-C and SIGTERM as an exception, which can be put off while something is done that must be done whole."""

import contextlib
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """One of SIGNALS came; its number is the second argument."""


def raise_stopped(number, frame):
    raise Stopped("interrupted", number)


@contextlib.contextmanager
def handled(handler, numbers):
    """Have a function handle signals while the block runs."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raised():
    """SIGNALS raise Stopped while the block runs, but for those that are ignored, as in a shell's background."""
    return handled(raise_stopped, [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN])


@contextlib.contextmanager
def put_off():
    """What comes of SIGNALS while the block runs takes effect when it is done, or has failed."""
    came, numbers = [], []
    if threading.current_thread() is threading.main_thread():  # no other gets signals, nor may it handle them
        numbers = [n for n in SIGNALS if callable(signal.getsignal(n))]
    try:
        with handled(lambda *arguments: came.append(arguments), numbers):
            yield
    finally:
        for number, frame in came[:1]:
            signal.getsignal(number)(number, frame)
