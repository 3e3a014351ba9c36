"""Finding the files of the E2E dataset, and downloading them from its release."""

import functools
import hashlib
import os
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import IO

from tqdm import tqdm

from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

E2E_URL = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"
E2E_FOLDER = Path("data/e2e")
E2E_SHA256 = {
    "trainset.csv": "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}
GET_E2E = f"give --data a folder with {', '.join(E2E_SHA256)} from {E2E_URL}"
TIMEOUT = 5  # seconds that one network operation may take
DEADLINE = 120  # seconds that the whole download may take
MAX_BYTES = 32 * 2**20  # of the zip and of each file in it; the largest has 9 MiB


def find_e2e(data: str | Path | None = None) -> Path | None:
    """The folder of the E2E files: `data` if given, else data/e2e or the user's cache, else downloaded.

    None if the download fails: the bundled sample is used then.
    """
    if data is not None:
        return Path(data)
    for folder in (E2E_FOLDER, cache_folder()):
        if all((folder / name).is_file() for name in E2E_SHA256):
            return folder
    return download_e2e()


def cache_folder() -> Path:
    """The folder of the files if data/e2e is not writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minprefix", "e2e")


@functools.cache  # one attempt and one message per process
def download_e2e() -> Path | None:
    """Download the E2E files and return their folder; if anything fails, print a warning and return None."""
    try:
        with tempfile.TemporaryFile() as file:
            fetch(E2E_URL, file)
            archive = zipfile.ZipFile(file)
            contents = {name: archive.open(f"e2e-dataset/{name}").read(MAX_BYTES) for name in E2E_SHA256}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != E2E_SHA256[name]:
                raise OSError(f"{name} has a wrong checksum")
        return write_e2e(contents)
    except Exception as error:  # no network, a damaged zip (many kinds of exception), a read-only folder, ...
        reason = " ".join(str(error).split()).strip("<>") or type(error).__name__
        problem = f"no E2E data in {E2E_FOLDER}, and the download failed ({reason:.200})"
        consequence = "using the small bundled sample, whose scores are not E2E scores"
        print(f"{problem}: {consequence}; for the real data {GET_E2E}", file=sys.stderr)
        return None


def write_e2e(contents: dict[str, bytes]) -> Path:
    """Write the files to data/e2e or, if that fails, to the user's cache; return the folder."""
    try:
        return write_files(E2E_FOLDER, contents)
    except (OSError, InputError) as error:
        folder = write_files(cache_folder(), contents)
        print(f"{error}: the E2E data are in {folder}", file=sys.stderr)
        return folder


def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        if not (folder / name).is_file():  # the user's files are not overwritten
            with atomic_write(folder / name, "wb") as target:
                target.write(content)
    return folder


def fetch(url: str, file: IO[bytes]) -> None:
    """Download a URL to an open file; OSError if the server fails, sends too much or is too slow."""
    end = time.monotonic() + DEADLINE
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        total = response.length
        with tqdm(total=total, unit="B", unit_scale=True, desc="E2E data", leave=False, disable=None) as bar:
            while chunk := response.read1(2**16):  # read1 returns what has arrived, read would wait for 64 KiB
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > MAX_BYTES or time.monotonic() > end:
                    raise OSError(f"gave up after {file.tell()} bytes: too large or too slow")
    if total and file.tell() < total:
        raise OSError(f"broke off after {file.tell()} of {total} bytes")
