"""Files from the network: bounded in time, resumed where they broke off, checked before they count."""

import glob
import hashlib
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import Request

from tqdm import tqdm

from minprefix.system.errors import InputError

TIMEOUT = 10  # seconds that one network operation may take
TRIES = 4  # so many in a row without a further byte, and it gives up
PAUSE = 1  # seconds before the second of them; each later pause is twice as long


class Broken(Exception):
    """A download broke off, or what arrived is wrong: another try may succeed."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as urllib does, but sends a token to no other host, and keeps the headers on the way."""

    def __init__(self) -> None:
        self.headers: list[HTTPMessage] = []

    def redirect_request(
        self, request: Request, response: IO[bytes], code: int, message: str, headers: HTTPMessage, url: str
    ) -> Request | None:
        followed = super().redirect_request(request, response, code, message, headers, url)
        if followed and urlsplit(url)[:2] != urlsplit(request.full_url)[:2]:  # scheme and host
            followed.remove_header("Authorization")
        self.headers.append(headers)
        return followed


def open_url(url: str, timeout: float, headers: dict[str, str] | None = None) -> tuple[HTTPResponse, list[HTTPMessage]]:
    """The response at a URL, and the headers of all answers on the way to it, redirects first, its own last.

    It is asked for in a thread, which is abandoned after twice the timeout: urllib's own timeout does not cover the
    look-up of the host's name, nor headers that arrive slowly.
    """
    result, redirects = [], Redirects()

    def work() -> None:
        try:
            request = urllib.request.Request(url, headers=headers or {})
            result.append(urllib.request.build_opener(redirects).open(request, timeout=timeout))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2 * timeout)
    if not result:
        raise TimeoutError(f"timed out, no answer within {2 * timeout} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0], [*redirects.headers, result[0].headers]


def fetch_bytes(url: str, what: str, timeout: float, deadline: float, most: int) -> bytes:
    """What is at a URL, in one try. Some exception if the server fails, takes too long (seconds), or sends too much.

    timeout: of one network operation; deadline: of all of it. what: what the progress bar calls it.
    """
    end, content = time.monotonic() + deadline, bytearray()
    with open_url(url, timeout)[0] as response:
        total = response.length
        with tqdm(total=total, unit="B", unit_scale=True, desc=what, leave=False, disable=None) as bar:
            while chunk := response.read1(2**16):  # read1 returns what has arrived, read waits for all of it
                content += chunk
                bar.update(len(chunk))
                if len(content) > most or time.monotonic() > end:
                    raise OSError(f"gave up after {len(content)} bytes: too large or too slow")
    if total and len(content) < total:
        raise OSError(f"broke off after {len(content)} of {total} bytes")
    return bytes(content)


def fetch(url: str, path: Path, headers: dict[str, str] | None = None) -> tuple[Path, list[HTTPMessage]]:
    """Download a URL to PATH.ETAG-SIZE.part, beside `path`, and check it -> (that file, the headers of all answers).

    If a part is there already, only the rest is downloaded, provided that the file on the server is still the same.
    Raises HTTPError if the server refuses, URLError or TimeoutError if there is no connection, InputError if the
    download breaks off again and again.
    """
    failures, most = 0, 0
    while True:
        try:
            return fetch_once(url, path, headers or {})
        except Broken as error:
            size = max((part.stat().st_size for part in parts_of(path)), default=0)
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures == TRIES:
                reason = " ".join(str(error).split())
                again = "try again, what has arrived is kept" if size else "try again later"
                raise InputError(f"the download of {url} failed {TRIES} times ({reason}): {again}") from error
            time.sleep(PAUSE * 2 ** (failures - 1))


def fetch_once(url: str, path: Path, headers: dict[str, str]) -> tuple[Path, list[HTTPMessage]]:
    """One try of `fetch`; Broken if another may succeed."""
    parts = parts_of(path)
    start = max(parts[0].stat().st_size - 1, 0) if parts else 0  # the last byte again, as a range may not be empty
    response, answers = open_range(url, parts, start, headers)
    with response:
        etag, size = identity(url, response, answers)
        part = path.with_name(f"{path.name}.{re.sub('[^0-9A-Za-z-]', '', etag)[:80]}-{size}.part")
        if response.status != 206:  # the server sends all of it
            start = 0
        same = part in parts and response.headers["Content-Range"] == f"bytes {start}-{size - 1}/{size}"
        for old in parts:
            if old != part or (start and not same):
                old.unlink()
        if response.status == 206 and not same:
            raise Broken("it changed on the server")
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            copy(response, file, size, path.name)
    check_digest(part, etag)
    return part, answers


def parts_of(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{glob.escape(path.name)}.*.part"))


def open_range(
    url: str, parts: list[Path], start: int, headers: dict[str, str]
) -> tuple[HTTPResponse, list[HTTPMessage]]:
    """`open_url` from byte `start` on; Broken where another try may help."""
    try:
        return open_url(url, TIMEOUT, {**headers, "Range": f"bytes={start}-"} if start else headers)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file has become shorter
            for part in parts:
                part.unlink()
        if error.code in (408, 416, 429) or error.code >= 500:
            raise Broken(error) from error
        raise
    except (urllib.error.URLError, TimeoutError) as error:
        if not parts:
            raise  # no network at all: say so at once
        raise Broken(error) from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def identity(url: str, response: HTTPResponse, answers: list[HTTPMessage]) -> tuple[str, int]:
    """The ETag and the size of a file. Where the hub redirects to another host, its own answer tells them."""
    etag = next((answer["X-Linked-Etag"] for answer in answers if answer["X-Linked-Etag"]), response.headers["ETag"])
    size = next((answer["X-Linked-Size"] for answer in answers if answer["X-Linked-Size"]), None)
    if size is None and response.status == 206:
        size = (response.headers["Content-Range"] or "").rpartition("/")[2]
    elif size is None:
        size = response.headers["Content-Length"]
    etag = (etag or "").strip().removeprefix("W/").strip('"')
    if not etag or not re.fullmatch("[0-9]{1,18}", size or ""):
        raise InputError(f"{url}: the answer has no ETag or no size, so it is not a file of the hub: check HF_ENDPOINT")
    return etag, int(size)


def copy(response: HTTPResponse, file: IO[bytes], size: int, name: str) -> None:
    """Write a response to a file from its present place on; Broken if the file then has other than `size` bytes."""
    with tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, desc=name, leave=False, disable=None) as bar:
        while file.tell() <= size:
            try:
                chunk = response.read1(2**20)  # read1 returns what has arrived, read waits for all of it
            except (OSError, http.client.HTTPException) as error:
                raise Broken(f"{error} after {file.tell()} of {size} bytes") from error
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
    if file.tell() < size:
        raise Broken(f"broke off after {file.tell()} of {size} bytes")
    if file.tell() > size:
        file.truncate(0)
        raise Broken(f"more than {size} bytes arrived")
    file.flush()
    os.fsync(file.fileno())


def check_digest(part: Path, etag: str) -> None:
    """Remove the file and raise Broken if an ETag that is a hash (SHA-256, or git's SHA-1 of a blob) is not its own."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        digest = hashlib.sha1(b"blob %d\0" % part.stat().st_size)
    else:
        return
    with open(part, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != etag:
        part.unlink()
        raise Broken(f"its {digest.name.upper()} is {digest.hexdigest()}, the server says {etag}")
