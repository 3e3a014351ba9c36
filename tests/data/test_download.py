"""The E2E files are downloaded whole, or the bundled sample is used and one line says why."""

import hashlib
import http.server
import io
import socket
import threading
import time
import zipfile
from pathlib import Path

import pytest

from minprefix.data import download
from minprefix.data.download import find_e2e
from minprefix.data.sample_e2e import sample_rows
from minprefix.data.tasks import Example, linearise_e2e, load_examples
from tests.helpers import E2E, needs_e2e

pytestmark = pytest.mark.slow

OFFICIAL_URL = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test has an empty current directory, no network but its own, and a fresh try at the download."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(download, "E2E_URL", f"http://127.0.0.1:{closed_port()}/e2e.zip")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    download.download_e2e.cache_clear()
    yield
    download.download_e2e.cache_clear()


def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@needs_e2e
def test_real_e2e_is_the_official_release():
    for name, digest in download.E2E_SHA256.items():
        assert hashlib.sha256((E2E / name).read_bytes()).hexdigest() == digest


CONTENTS = {
    "trainset.csv": "mr,ref\n" + "".join(f"name[A{i}],This is A{i} of {hash(i) % 97}.\n" for i in range(500)),
    "devset.csv": "mr,ref\nname[B],This is B.\nname[B],It is B.\n",
    "testset_w_refs.csv": "mr,ref\nname[C],This is C.\n",
}


def zip_of(contents, folder="e2e-dataset/"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**contents, "../evil.csv": "x", "README.md": "y"}.items():
            archive.writestr(folder + name, text)
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """serve(answer) -> the list of requests; answer(handler, stop) replies to each."""
    for name, text in CONTENTS.items():
        monkeypatch.setitem(download.E2E_SHA256, name, hashlib.sha256(text.encode()).hexdigest())
    servers, stop = [], threading.Event()

    def start(answer):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                answer(self, stop)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.handle_error = True, lambda *arguments: None
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(download, "E2E_URL", f"http://127.0.0.1:{server.server_port}/e2e.zip")
        return requests

    yield start
    stop.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def send(content, length=None, status=200):
    def answer(handler, stop):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def drip(handler, stop):
    """Always a little more to send, so that no single read times out."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    while not stop.wait(0.02):
        handler.wfile.write(b"x")


def in_pieces(content):
    def answer(handler, stop):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        for i in range(0, len(content), 1000):
            handler.wfile.write(content[i : i + 1000])
            handler.wfile.flush()

    return answer


def corrupt(content):
    """Damaged in the middle of the first file's compressed bytes."""
    return content[:200] + bytes(255 - byte for byte in content[200:260]) + content[260:]


def lines_of(capsys):
    out, err = capsys.readouterr()
    assert out == "" and (not err or err.endswith("\n"))
    return err.splitlines()


def assert_sample(capsys, reason):
    """All splits come from the sample, with one line for all of them, and nothing is left in the current directory."""
    for split in ("train", "dev", "test"):
        examples = load_examples("e2e", split)
        rows = sample_rows(split)
        assert [y for example in examples for y in example.references] == [y for _, y in rows]
        assert [example.source for example in examples] == [linearise_e2e(mr) for mr in dict(rows)]
    assert find_e2e() is None
    (line,) = lines_of(capsys)
    assert reason in line and "not E2E scores" in line and "--data" in line and OFFICIAL_URL in line
    assert [path for path in Path().rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("answer", [send, in_pieces], ids=["with a length", "without"])
def test_download(serve, capsys, monkeypatch, answer):
    requests = serve(answer(zip_of(CONTENTS)))
    assert find_e2e() == Path("data/e2e")
    assert load_examples("e2e", "dev") == [Example("name : B", ["This is B.", "It is B."])]
    files = {path.name: path.read_text() for path in Path().resolve().parent.rglob("*") if path.is_file()}
    assert files == CONTENTS  # nothing else from the zip, no temporary file
    assert len(requests) == 1 and lines_of(capsys) == []

    download.download_e2e.cache_clear()  # a later process, without a network
    monkeypatch.setattr(download, "E2E_URL", f"http://127.0.0.1:{closed_port()}/e2e.zip")
    assert len(load_examples("e2e", "train")) == 500 and lines_of(capsys) == []


def test_download_keeps_the_users_files(serve, capsys):
    serve(send(zip_of(CONTENTS)))
    Path("data/e2e").mkdir(parents=True)
    Path("data/e2e/devset.csv").write_text("mr,ref\nname[Mine],m\n")
    assert load_examples("e2e", "dev") == [Example("name : Mine", ["m"])]
    assert len(load_examples("e2e", "train")) == 500 and lines_of(capsys) == []


GOOD_ZIP = zip_of(CONTENTS)
WRONG = {**CONTENTS, "testset_w_refs.csv": "mr,ref\nname[C],This is D.\n"}
FAILURES = {
    "truncated": (send(GOOD_ZIP[:500], len(GOOD_ZIP)), f"after 500 of {len(GOOD_ZIP)} bytes"),
    "truncated, and nobody says so": (send(GOOD_ZIP[:500]), "not a zip file"),
    "corrupt": (send(corrupt(GOOD_ZIP)), "trainset.csv"),
    "wrong checksum": (send(zip_of(WRONG)), "testset_w_refs.csv has a wrong checksum"),
    "no such page": (send(b"<html>", status=404), "HTTP Error 404"),
    "no zip": (send(b"<html>log in</html>"), "not a zip file"),
    "empty": (send(b""), "not a zip file"),
    "other members": (send(zip_of(CONTENTS, "")), "no item named 'e2e-dataset/trainset.csv'"),
    "one member missing": (send(zip_of({"trainset.csv": CONTENTS["trainset.csv"]})), "no item named"),
    "not HTTP": (lambda handler, stop: handler.wfile.write(b"hello\n"), "hello"),
}
SLOW = {
    "silent": (lambda handler, stop: stop.wait(), "timed out"),
    "stops midway": (lambda handler, stop: (send(GOOD_ZIP[:500], 999)(handler, stop), stop.wait()), "timed out"),
    "slow": (drip, "too slow"),
}


@pytest.mark.parametrize("name", FAILURES | SLOW)
def test_download_fails(serve, capsys, monkeypatch, name):
    answer, reason = (FAILURES | SLOW)[name]
    if name in SLOW:  # only there: elsewhere a busy machine might need the time
        monkeypatch.setattr(download, "TIMEOUT", 0.3)
        monkeypatch.setattr(download, "DEADLINE", 0.5)
    begin = time.monotonic()
    requests = serve(answer)
    assert_sample(capsys, reason)
    assert len(requests) == 1 and time.monotonic() - begin < 5


def test_download_too_large(serve, capsys, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", len(GOOD_ZIP) - 1)
    serve(send(GOOD_ZIP))
    assert_sample(capsys, "too large")


def test_no_network(capsys):
    begin = time.monotonic()
    assert_sample(capsys, "(urlopen error [Errno")
    assert time.monotonic() - begin < 5


def test_a_folder_that_cannot_be_written_is_replaced_by_the_users_cache(serve, capsys, tmp_path):
    requests = serve(send(GOOD_ZIP))
    Path("data").symlink_to("/dev/null")
    folder = tmp_path / "cache" / "minprefix" / "e2e"
    assert find_e2e() == folder and load_examples("e2e", "dev") == [Example("name : B", ["This is B.", "It is B."])]
    (line,) = lines_of(capsys)
    assert "cannot write data/e2e/" in line and line.endswith(f": the E2E data are in {folder}")
    assert {path.name: path.read_text() for path in folder.iterdir()} == CONTENTS
    download.download_e2e.cache_clear()  # a later process
    assert find_e2e() == folder and len(requests) == 1 and lines_of(capsys) == []


def test_no_folder_can_be_written(serve, capsys):
    serve(send(GOOD_ZIP))
    for name in ("data", "../cache"):
        Path(name).symlink_to("/dev/null")
    assert find_e2e() is None and load_examples("e2e", "dev")
    (line,) = lines_of(capsys)
    assert "cannot write " in line and "/cache/minprefix/e2e/" in line
