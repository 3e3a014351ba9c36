"""The exceptions for user errors, and `run_main`, which reports them in one line and sets the exit code."""

import contextlib
import errno
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from minprefix.system import signals

# Error codes of a failing write: disk full, quota or file size limit reached, device failed, file closed.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class InputError(Exception):
    """An error in the user's input. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        if len(line) > 2000:  # the message may quote a file of any length
            line = f"{line[:1000]} [...] {line[-900:]}"
        # Unprintable characters are escaped: quoted text must not send control sequences to the terminal.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


class WriteError(InputError):
    """A file could not be written, for example because the disk is full. Another try may succeed."""


class OutOfMemory(InputError):
    """There was too little memory. Another try may succeed."""


@functools.cache
def print_once(message: str) -> None:
    """Print a message to stderr, but only the first time that this message is given."""
    print(message, file=sys.stderr)


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`: an InputError becomes one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143.

    Too little memory and a failing write are InputErrors, too (see `one_line_errors`). A closed pipe ends the script
    silently, like other commands. Characters that the output's encoding lacks are escaped.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # None if the shell has closed it (<&-)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals.signals_as_exceptions(), one_line_errors():
            main()
            print(end="", flush=True)  # raises here if the pipe is closed, instead of while Python exits
    except BrokenPipeError:  # the reader of the output has exited, as in `| head`
        exit_with("", 128 + signal.SIGPIPE)
    except InputError as error:
        exit_with(f"error: {error}\n", 2)
    except KeyboardInterrupt as stop:
        message, number = stop.args or ("interrupted", signal.SIGINT)
        exit_with(f"{message}\n", 128 + number)


def exit_with(message: str, code: int) -> NoReturn:
    """Write a message to stderr, if that is possible, and exit with a code."""
    with contextlib.suppress(OSError):
        sys.stderr.write(message)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would flush again at exit, and print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Raise OutOfMemory if the block runs out of memory, WriteError if its output cannot be written."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            size = re.search(r"allocate ([\d.]+ \w+)", str(error))
            remedy = "free some, or lower --batch-size, --beams or --max-source, or take a smaller model"
            raise OutOfMemory(f"out of memory{f' ({size[1]} more needed)' if size else ''}: {remedy}") from error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            file = error.filename or "the output"  # a failing print names no file
            raise WriteError(f"cannot write {file}: {error.strerror}; make room, or write elsewhere") from error
        raise


def out_of_memory(error: Exception) -> bool:
    """Whether an exception means too little memory: Python's, NumPy's, the system's, or torch's on any device."""
    if isinstance(error, (RuntimeError, OSError)):
        return bool(re.search("out of memory|can(?:'t|not) allocate memory|ALLOC_FAILED", str(error), re.I))
    return isinstance(error, MemoryError)
