"""What goes wrong as one line for the user: the error that input raises, and how a script ends."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from minprefix.system import signals

# What the system says where a file cannot grow: the disk, the user's share of it or a limit is reached, or it is gone.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class InputError(Exception):
    """The user's input is at fault; the message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        if len(line) > 2000:  # it may quote a file of any length
            line = f"{line[:1000]} [...] {line[-900:]}"
        # Nor may such a quotation move the terminal's cursor: unprintable characters are escaped.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


class WriteError(InputError):
    """A file could not be written: the disk is full, say. Another try may succeed."""


class OutOfMemory(InputError):
    """There was too little memory. Another try may succeed."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`: an InputError becomes one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143.

    So do too little memory and no room for the output (`one_line_errors`). A closed pipe ends the script without a
    word, as it ends other commands. Characters that the output's encoding lacks are escaped.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # None where the shell has closed it (<&-)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals.signals_as_exceptions(), one_line_errors():
            main()
            print(end="", flush=True)  # a pipe that is closed shows here, not when Python ends
    except BrokenPipeError:  # `| head`: who reads the output has enough
        exit_with("", 128 + signal.SIGPIPE)
    except InputError as error:
        exit_with(f"error: {' '.join(str(error).split())}\n", 2)
    except KeyboardInterrupt as stop:
        message, number = stop.args or ("interrupted", signal.SIGINT)
        exit_with(f"{message}\n", 128 + number)


def exit_with(message: str, code: int) -> NoReturn:
    """Exit with a code, after a message on stderr if that can be written to."""
    with contextlib.suppress(OSError):
        sys.stderr.write(message)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again when it ends, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Raise OutOfMemory where the block has too little memory, WriteError where its output finds no room."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
            remedy = "free some, or lower --batch-size, --beams or --max-source, or take a smaller model"
            raise OutOfMemory(f"out of memory{f' ({asked[1]} more needed)' if asked else ''}: {remedy}") from error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            where = error.filename or "the output"  # of a print
            raise WriteError(f"cannot write {where}: {error.strerror}; make room, or write elsewhere") from error
        raise


def out_of_memory(error: Exception) -> bool:
    """Whether an exception is for want of memory: Python's, NumPy's, the system's, or torch's on any device."""
    words = "out of memory|can(?:'t|not) allocate memory|ALLOC_FAILED"
    said = isinstance(error, (RuntimeError, OSError)) and re.search(words, str(error), re.I)
    return isinstance(error, MemoryError) or bool(said)
