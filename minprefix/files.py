"""Files that are read with a clear complaint and written whole or not at all."""

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from minprefix import signals


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


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`: an InputError becomes one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143.

    As of other commands, a closed pipe ends it without a word.
    """
    try:
        with signals.raised():
            main()
            print(end="", flush=True)  # a pipe that is closed shows here, not when Python ends
    except BrokenPipeError:  # `| head`: who reads the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
        sys.exit(128 + signal.SIGPIPE)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        message, number = stop.args or ("interrupted", signal.SIGINT)
        print(message, file=sys.stderr)
        sys.exit(128 + number)


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file (or of stdin, for "-"), a byte-order mark dropped, line ends kept as they are."""
    name = "stdin" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_json(path: str | Path) -> Any:
    """A JSON file's value."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def umask() -> int:
    """The permissions that new files shall not have; there is no way to ask for it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` for writing; rename it to `path` only if the block succeeds.

    A link is followed. What is no file, as a pipe or /dev/null, is written to as it is, for a rename would replace it.
    """
    path = Path(os.path.realpath(path))
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, mode, **text) as file:
            yield file
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save fails once more when it closes the file
        if isinstance(error, OSError):
            raise WriteError(f"cannot write {path}: {error.strerror}") from error
        raise
