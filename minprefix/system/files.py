"""Files that are read with a clear complaint and written whole or not at all; folders for one process at a time."""

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


@contextlib.contextmanager
def locked(folder: Path, new: bool = False, wait: str = "") -> Iterator[None]:
    """Let one process at a time into the block for a folder, which is made if need be, and removed if it stays empty.

    Where another process is in it: InputError, or print `wait` and wait. new: FileExistsError if the folder is there.
    """
    path = Path(os.path.realpath(folder))  # what a link leads to need not be there
    made = [part for part in (path, *path.parents) if not part.exists()]
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
            for part in made:
                with contextlib.suppress(OSError):  # it is not empty
                    part.rmdir()


@contextlib.contextmanager
def lock_of_system(folder: Path, wait: str) -> Iterator[None]:
    """flock on the folder itself: it leaves no file, and ends with its process, however that ends.

    On Windows and on network disks without such locks nothing is locked.
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
    """The permissions that new files shall not have; there is no way to ask for it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def is_stream(path: str | Path) -> bool:
    """Whether it is there and neither file nor folder: a pipe, a terminal, /dev/null."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_writable(path: Path) -> None:
    """WriteError, before any work, unless `atomic_write` could write a file there. Makes no folder."""
    if os.path.isdir(path):
        raise WriteError(f"cannot write {path}: it is a folder")
    if not is_stream(path):
        target = Path(os.path.realpath(path))
        folder = next(parent for parent in target.parents if os.path.exists(parent))
        try:
            tempfile.NamedTemporaryFile(prefix=target.name + ".", suffix=".tmp", dir=folder).close()
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` for writing; rename it to `path` only if the block succeeds.

    A link is followed. What is no file, as a pipe or /dev/null, is written to as it is, for a rename would replace it.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if is_stream(path):  # by this name: what /dev/stdout links to may have no other
        try:
            with open(path, mode, **text) as file:
                yield file
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror}") from error
        return
    target = Path(os.path.realpath(path))  # messages name `path`, as the user wrote it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=target.name + ".", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from error
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
            error = error.__context__  # torch.save fails once more when it closes the file
        if isinstance(error, OSError):
            raise WriteError(f"cannot write {path}: {error.strerror}") from error
        raise


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as a JSONL file, whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
