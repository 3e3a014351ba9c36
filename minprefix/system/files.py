"""Reading files with errors of one line, writing them completely or not at all, and locking folders."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from minprefix.system.errors import InputError, WriteError


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file (or of stdin, for "-"), without a byte-order mark, with its line ends unchanged."""
    name = "stdin" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; InputError if it cannot be read or is not valid JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


@contextlib.contextmanager
def locked(folder: Path, new: bool = False, wait: str = "") -> Iterator[None]:
    """Hold an exclusive lock on a folder while the block runs. A missing folder is created, and removed if left empty.

    If another process holds the lock: InputError, or with `wait` print that message to stderr and wait. new: raise
    FileExistsError if the folder exists already.
    """
    path = Path(os.path.realpath(folder))  # the target of a symbolic link may not exist yet
    created = [part for part in (path, *path.parents) if not part.exists()]
    try:
        path.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            raise
        raise WriteError(f"cannot write {folder}: {error.strerror}") from error
    with lock_of_system(folder, wait):
        try:
            yield
        finally:
            for part in created:
                with contextlib.suppress(OSError):  # not empty
                    part.rmdir()


@contextlib.contextmanager
def lock_of_system(folder: Path, wait: str) -> Iterator[None]:
    """Lock the folder itself with flock, which needs no lock file and is released however the process ends.

    On Windows, and on network disks without flock, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                message = f"another process is working in {folder}: wait until it has ended, or choose another folder"
                raise InputError(message) from None
            print(wait, file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a network disk
        yield
    finally:
        os.close(handle)


def umask() -> int:
    """The process's umask: the permission bits that new files do not get. It can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def is_stream(path: str | Path) -> bool:
    """Whether the path exists and is neither a file nor a folder: a pipe, a terminal, /dev/null."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Raise WriteError for an OSError in the block; `path` is the file that is being written, for the message."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Raise WriteError if `atomic_write` could not write this file; called before any work. Creates no folder."""
    if os.path.isdir(path):
        raise WriteError(f"cannot write {path}: it is a folder")
    if not is_stream(path):
        target = Path(os.path.realpath(path))
        folder = next(parent for parent in target.parents if os.path.exists(parent))
        with write_errors(path):
            tempfile.NamedTemporaryFile(prefix=target.name + ".", suffix=".tmp", dir=folder).close()


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file in the folder of `path` for writing; rename it to `path` only if the block succeeds.

    A symbolic link is followed. A pipe or device such as /dev/null is written to directly: a rename would replace it.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if is_stream(path):  # opened by this name: the target of /dev/stdout may have no path
        with write_errors(path), open(path, mode, **text) as file:
            yield file
        return
    target = Path(os.path.realpath(path))  # error messages name `path`, as the user wrote it
    with write_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=target.name + ".", suffix=".tmp", dir=target.parent)
        try:
            with os.fdopen(handle, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
                raise error.__context__ from None  # torch.save fails a second time when it closes the file
            raise


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSONL file, one JSON object per line, by `atomic_write`."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
