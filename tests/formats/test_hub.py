"""A model's name leads to the same files as on the hub, or to one line; a server that misbehaves changes neither."""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from minprefix.formats import download, hub, load
from minprefix.formats.hub import find_model, hub_cache, is_hub_name, model_name, resolve_model
from minprefix.formats.safetensors import read_tensors, write_safetensors
from minprefix.formats.tokenizer import load_tokenizer
from minprefix.system.errors import InputError
from tests.tiny import write_tiny_bart, write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json"}
OTHERS = {"README.md": b"# A model", "pytorch_model.bin": b"never read", "tokenizer.json": b"{}", "tf_model.h5": b"x"}


class FakeHub:
    """Serves repositories (name -> file name -> bytes) as huggingface.co does, in the headers that matter.

    Small files come by way of a relative redirect, large ones (LFS) by a redirect to another host. trouble: file
    name -> how to answer the next requests for its content. requests: (host, path, token, range).
    """

    def __init__(self):
        self.repositories, self.trouble, self.requests, self.refuse = {}, {}, [], None
        self.stop = threading.Event()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.handle_error = True, lambda *arguments: None
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        headers = handler.headers
        host = headers["Host"].partition(":")[0]
        self.requests.append((host, handler.path, headers["Authorization"], headers["Range"]))
        if self.refuse:
            return send(handler, self.refuse)
        elsewhere = handler.path.startswith("/content/")
        name, _, rest = handler.path.removeprefix("/content/").removeprefix("/").partition("/resolve/")
        content = self.repositories.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            return send(handler, 404)
        file_name, large = rest.partition("/")[2], rest.endswith((".safetensors", ".bin"))
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if not elsewhere:
            host = f"http://localhost:{self.server.server_port}" if large else ""
            linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": len(content)}
            headers = {"Location": f"{host}/content{handler.path}", "X-Repo-Commit": COMMIT, "ETag": "of the redirect"}
            return send(handler, 302 if large else 307, headers | (linked if large else {}))
        troubles = self.trouble.get(file_name, [])
        etag = "0" * 32 if large else sha1
        (troubles.pop(0) if troubles else serve)(handler, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def ranges(self, file_name):
        return [r[3] for r in self.requests if r[1].startswith("/content/") and r[1].endswith(f"/{file_name}")]


def send(handler, status, headers=(), body=b"", length=None):
    handler.send_response(status)
    for key, value in dict(headers).items():
        handler.send_header(key, str(value))
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def serve(handler, content, headers, most=None, spoil=lambda body: body):
    """The file, or the range of it that is asked for; at most so many bytes of it, though it announces all."""
    start, status = 0, 200
    if handler.headers["Range"]:
        start, status = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
        headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if start >= len(content):
            return send(handler, 416)
    send(handler, status, headers, spoil(content[start:])[:most], len(content) - start)


def breaks_off(handler, content, headers):
    serve(handler, content, headers, most=20_000)


def stalls(handler, content, headers):
    serve(handler, content, headers, most=20_000)
    time.sleep(1.5)


def corrupts(handler, content, headers):
    serve(handler, content, headers, spoil=lambda body: body[:-9] + bytes([255 - body[-9]]) + body[-8:])


def cuts_short_and_says_so(handler, content, headers):
    send(handler, 200, headers, content[:20_000])


def sends_too_much(handler, content, headers):
    send(handler, 200, headers, content + b"x")


def ignores_ranges(handler, content, headers):
    send(handler, 200, headers, content)


def answers_another_range(handler, content, headers):
    send(handler, 206, {**headers, "Content-Range": f"bytes 5-{len(content) - 1}/{len(content)}"}, content[5:])


def hangs_up(handler, content, headers):
    handler.close_connection = True


def is_no_http(handler, content, headers):
    handler.wfile.write(b"hello\n")
    handler.close_connection = True


def errs(status):
    return lambda handler, content, headers: send(handler, status)


TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty `weights/`, an empty HuggingFace cache, an empty current directory, no server."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(hub, "WEIGHTS", home / "weights")
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", *TOKEN_VARIABLES):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(download, "PAUSE", 0.001)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return home / "weights"


def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def fake(weights, monkeypatch):
    server = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """File name -> bytes of a tiny GPT-2, and what else such a repository has."""
    folder = write_tiny_model(tmp_path_factory.mktemp("hub") / "tiny")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "generation_config.json": b'{"eos_token_id": 50256}', **OTHERS}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def needed(files):
    return {name: content for name, content in files.items() if name in NEEDED}


def complaint(name):
    with pytest.raises(InputError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- downloads ----


def test_download(fake, weights, tiny, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake.repositories["openai-community/gpt2-medium"] = tiny
    folder = resolve_model("gpt2-medium")
    assert folder == weights / "gpt2-medium" and contents(weights / "gpt2-medium") == needed(tiny)
    assert os.listdir(weights) == ["gpt2-medium"]  # no temporary folder is left
    assert load.load_model("gpt2-medium").config["n_embd"] == 32 and load_tokenizer("gpt2-medium").encode("a")
    out, err = capsys.readouterr()
    assert out == "" and err == f"downloading gpt2-medium from {fake.url} to {folder}\n"

    hosts = {(host, token) for host, _, token, _ in fake.requests}
    assert hosts == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}  # the other host sees no token
    revisions = [path.split("/")[4] for _, path, _, _ in fake.requests if not path.startswith("/content")]
    assert revisions == ["main"] + [COMMIT] * 4  # all of one commit, whatever `main` is meanwhile
    before = len(fake.requests)
    assert resolve_model("gpt2-medium") == folder and len(fake.requests) == before


def test_download_of_an_owners_model(fake, weights, tmp_path):
    folder = write_tiny_bart(tmp_path / "bart")
    (folder / "merges.txt").rename(folder / "merges")  # the tokeniser is tokenizer.json alone
    (folder / "tokenizer.json").write_text("{}")
    fake.repositories["facebook/bart-base"] = contents(folder)
    assert resolve_model("facebook/bart-base") == weights / "facebook" / "bart-base"
    assert set(os.listdir(weights / "facebook" / "bart-base")) == {
        "config.json", "vocab.json", "tokenizer.json", "model.safetensors"
    }  # fmt: skip
    assert os.listdir(weights / "facebook") == ["bart-base"]
    assert model_name(weights / "facebook" / "bart-base") == "facebook/bart-base"


@pytest.mark.parametrize("kind", ["safetensors shards", "bin", "bin shards"])
def test_other_forms_of_the_weights(fake, weights, tiny, tmp_path, kind):
    folder = tmp_path / "other"
    folder.mkdir()
    whole = weights.parent / "whole"
    whole.mkdir()
    (whole / "model.safetensors").write_bytes(tiny["model.safetensors"])
    tensors = read_tensors(whole)
    halves = [dict(list(tensors.items())[half::2]) for half in (0, 1)] if "shards" in kind else [tensors]
    ending, stem = ("bin", "pytorch_model") if "bin" in kind else ("safetensors", "model")
    names = [f"{stem}{f'-{i}-of-2' if 'shards' in kind else ''}.{ending}" for i in range(len(halves))]
    for name, half in zip(names, halves, strict=True):
        write_safetensors(folder / name, half) if ending == "safetensors" else torch.save(half, folder / name)
    if "shards" in kind:
        index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    rest = {name: tiny[name] for name in ("config.json", "vocab.json", "merges.txt", "README.md")}
    fake.repositories["my/model"] = {**rest, **contents(folder)}
    rest.pop("README.md")
    assert contents(resolve_model("my/model")) == {**rest, **contents(folder)}
    found = read_tensors(weights / "my" / "model")
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)


TROUBLE = {
    "breaks off again and again": ([breaks_off] * 6, 7),
    "stalls": ([stalls], 2),
    "corrupts": ([corrupts], 2),
    "corrupts what it resumes": ([breaks_off, corrupts], 3),
    "cuts short": ([cuts_short_and_says_so], 2),
    "sends too much": ([sends_too_much], 2),
    "ignores ranges": ([breaks_off, ignores_ranges], 2),
    "answers another range": ([breaks_off, answers_another_range], 3),
    "hangs up": ([hangs_up], 2),
    "hangs up midway": ([breaks_off, hangs_up], 3),
    "is no HTTP": ([is_no_http], 2),
    "overloaded": ([errs(503), errs(429), errs(500)], 4),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_that_passes(fake, weights, tiny, monkeypatch, name):
    troubles, requests = TROUBLE[name]
    if name == "stalls":  # only there: elsewhere a busy machine might need the time
        monkeypatch.setattr(download, "TIMEOUT", 0.3)
    fake.repositories["openai-community/gpt2"] = tiny
    fake.trouble["model.safetensors"] = list(troubles)
    assert contents(resolve_model("gpt2")) == needed(tiny) and os.listdir(weights) == ["gpt2"]
    ranges = fake.ranges("model.safetensors")
    assert len(ranges) == requests and fake.trouble["model.safetensors"] == []
    if troubles[0] is breaks_off:
        assert ranges[1] == "bytes=19999-"
    if len(troubles) == 6:  # each try goes on where the last one stopped, from its last byte
        assert ranges == [None] + [f"bytes={20_000 * i - i}-" for i in range(1, 7)]


@pytest.mark.parametrize(
    "trouble, reason",
    [
        (corrupts, "its SHA256 is"), (hangs_up, "closed connection"), (errs(503), "HTTP Error 503"),
        (sends_too_much, "more than"), (is_no_http, "hello"), (cuts_short_and_says_so, "broke off after 20000 of"),
    ],
)  # fmt: skip
def test_trouble_that_stays(fake, weights, tiny, trouble, reason):
    fake.repositories["openai-community/gpt2"] = tiny
    fake.trouble["model.safetensors"] = [trouble] * 100
    message = complaint("gpt2")
    assert reason in message and "model.safetensors" in message and "try again" in message
    assert not (weights / "gpt2").exists() and find_model("gpt2") is None
    assert len(fake.ranges("model.safetensors")) <= download.TRIES + 1
    fake.trouble.clear()
    assert contents(resolve_model("gpt2")) == needed(tiny) and os.listdir(weights) == ["gpt2"]


def test_a_later_run_goes_on(fake, weights, tiny):
    fake.repositories["openai-community/gpt2"] = tiny
    fake.trouble["model.safetensors"] = [breaks_off, *[hangs_up] * 3]
    assert "what has arrived is kept" in complaint("gpt2")
    (part,) = (weights / ".gpt2.part").glob("model.safetensors.*.part")
    assert part.read_bytes() == tiny["model.safetensors"][:20_000]
    fake.requests.clear()
    assert contents(resolve_model("gpt2")) == needed(tiny) and os.listdir(weights) == ["gpt2"]
    assert fake.ranges("model.safetensors") == ["bytes=19999-"]
    last = len(tiny["vocab.json"]) - 1
    assert fake.ranges("vocab.json") == [f"bytes={last}-"]  # complete already: one byte asks whether it still is so


@pytest.mark.parametrize("change", ["other bytes", "shorter", "gone"])
def test_a_later_run_finds_another_version(fake, weights, tiny, change):
    fake.repositories["openai-community/gpt2"] = tiny
    fake.trouble["model.safetensors"] = [breaks_off, *[hangs_up] * 3]
    complaint("gpt2")
    new = {**tiny, "model.safetensors": tiny["model.safetensors"][::-1]}
    if change == "shorter":
        new["model.safetensors"] = new["model.safetensors"][:5000]
    if change == "gone":
        new.pop("model.safetensors")
    fake.repositories["openai-community/gpt2"] = new
    names = NEEDED if change != "gone" else NEEDED - {"model.safetensors"} | {"pytorch_model.bin"}
    assert contents(resolve_model("gpt2")) == {name: new[name] for name in names}


def test_two_at_once(fake, weights, tiny, capsys):
    fake.repositories["openai-community/gpt2"] = tiny
    fake.trouble["model.safetensors"] = [lambda *arguments: (time.sleep(0.5), breaks_off(*arguments))]
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model("gpt2"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [weights / "gpt2"] * 4
    assert contents(weights) == {f"gpt2/{name}": content for name, content in needed(tiny).items()}
    assert len(fake.ranges("model.safetensors")) == 2 and len(fake.ranges("vocab.json")) == 1
    assert capsys.readouterr().err.count("waiting for another process") == 3


# ---- the token ----


def set_token(case, home, monkeypatch):
    """Set a case's variables and write its files, HF_HOME's among them; HERE stands for the folder."""
    for key in (*TOKEN_VARIABLES, "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    for name, text in case.items():
        if "/" in name:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
        else:
            monkeypatch.setenv(name, text.replace("HERE", str(home)))


LOGIN = {"HF_HOME": "HERE/hf", "hf/token": "hf_file"}
TOKENS = {  # what is set, files by their paths -> the token
    "nothing": ({"HF_HOME": "HERE/hf"}, None),
    "the login's": (LOGIN, "hf_file"),
    "with a line end": ({"HF_HOME": "HERE/hf", "hf/token": " hf_file\r\n"}, "hf_file"),
    "an empty file": ({"HF_HOME": "HERE/hf", "hf/token": "\n"}, None),
    "a variable before the file": ({"HF_TOKEN": "hf_new", **LOGIN}, "hf_new"),
    "new before old": ({"HF_TOKEN": "hf_new", "HUGGING_FACE_HUB_TOKEN": "hf_old", "HF_HOME": "HERE/hf"}, "hf_new"),
    "the old one before the file": ({"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "hf_old", **LOGIN}, "hf_old"),
    "a blank variable": ({"HF_TOKEN": " \n", "HUGGING_FACE_HUB_TOKEN": "hf_old", **LOGIN}, "hf_file"),
    "a file of one's own": ({"HF_TOKEN_PATH": "HERE/mine/secret", "mine/secret": "hf_mine", **LOGIN}, "hf_mine"),
    "a file that is not there": ({"HF_TOKEN_PATH": "HERE/mine/none", **LOGIN}, None),
    "~ and variables": (
        {"HOME": "HERE", "MINE": "mine", "HF_TOKEN_PATH": "~/${MINE}/secret", "mine/secret": "hf_mine"}, "hf_mine"),
    "the usual place": ({"HOME": "HERE", ".cache/huggingface/token": "hf_file"}, "hf_file"),
    "XDG's place": ({"XDG_CACHE_HOME": "HERE/xdg", "xdg/huggingface/token": "hf_file"}, "hf_file"),
    "forbidden": ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_TOKEN": "hf_new", **LOGIN}, None),
    "not forbidden": ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "HF_TOKEN": "hf_new", "HF_HOME": "HERE/hf"}, "hf_new"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_the_token_is_found_and_seen_by_the_hub_alone(name, fake, weights, tiny, tmp_path, monkeypatch):
    case, token = TOKENS[name]
    set_token(case, tmp_path / "user", monkeypatch)
    monkeypatch.setattr(hub, "CACHE", Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser())
    fake.repositories["openai-community/gpt2"] = tiny
    assert contents(resolve_model("gpt2")) == needed(tiny)
    seen = {(host, header) for host, _, header, _ in fake.requests}
    assert seen == {("127.0.0.1", token and f"Bearer {token}"), ("localhost", None)}


ASK = """
import importlib, json, os, sys
from huggingface_hub import constants, get_token
from huggingface_hub.utils import build_hf_headers
before, tokens = dict(os.environ), []
for variables in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(before | variables)
    importlib.reload(constants)
    tokens.append(build_hf_headers().get("authorization"))
json.dump(tokens, sys.stdout)
"""


def test_the_token_is_huggingface_hubs(tmp_path, monkeypatch):
    """The table above against the package itself."""
    pytest.importorskip("huggingface_hub")
    variables = []
    for i, (case, _) in enumerate(TOKENS.values()):
        with monkeypatch.context() as context:
            set_token(case, tmp_path / str(i), context)
            variables.append({name: os.environ[name] for name in case if "/" not in name})
    for key in (*TOKEN_VARIABLES, "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    asked = subprocess.run([sys.executable, "-c", ASK], input=json.dumps(variables), capture_output=True, text=True)
    expected = [token and f"Bearer {token}" for _, token in TOKENS.values()]
    assert dict(zip(TOKENS, json.loads(asked.stdout), strict=True)) == dict(zip(TOKENS, expected, strict=True))


def test_no_token_goes_with_a_refusal_into_the_message(fake, weights, monkeypatch):
    """But where it stood: an expired one is the reason why a public model is refused."""
    (weights.parent / "hf").mkdir()
    (weights.parent / "hf" / "token").write_text("hf_expired")
    fake.refuse = 401
    message = complaint("nobody/nothing")
    assert f"(what {weights.parent}/hf/token holds was sent)" in message and "hf_expired" not in message
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    message = complaint("nobody/nothing")
    assert "(what HF_TOKEN holds was sent)" in message and "hf_expired" not in message


def test_a_token_that_is_none(fake, weights, monkeypatch):
    path = weights.parent / "hf" / "token"
    path.mkdir(parents=True)
    assert f"cannot read {path}: Is a directory" in complaint("gpt2")
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    assert f"{path} is not UTF-8 text" in complaint("gpt2")
    path.write_text("hf_a hf_b")
    message = complaint("gpt2")
    assert f"the token in {path} has blanks" in message and "hf_a" not in message
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_\xe9")
    message = complaint("gpt2")
    assert "the token in HUGGING_FACE_HUB_TOKEN has blanks or other" in message and "hf_" not in message
    assert fake.requests == []


# ---- what cannot be downloaded ----


def test_no_such_model(fake, weights, tiny):
    for status, advice in ((401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "check the name")):
        fake.refuse = status
        message = complaint("nobody/nothing")
        assert str(status) in message and advice in message and fake.url in message and str(weights) in message
    assert not weights.exists() or os.listdir(weights) == []
    fake.refuse = 503
    assert "HTTP Error 503" in complaint("gpt2")


@pytest.mark.parametrize(
    "lacking, reason",
    [("vocab.json tokenizer.json", "no tokeniser"), ("config.json", "answers 404"),
     ("model.safetensors pytorch_model.bin", "has no weights")],
)  # fmt: skip
def test_incomplete_repository(fake, weights, tiny, lacking, reason):
    fake.repositories["a/b"] = {name: content for name, content in tiny.items() if name not in lacking.split()}
    assert reason in complaint("a/b") and not (weights / "a" / "b").exists()


def test_a_model_of_another_kind_is_refused_before_its_weights(fake, tiny):
    fake.repositories["a/b"] = {**tiny, "config.json": b'{"model_type": "llama"}'}
    assert "'llama' model, minprefix runs gpt2 and bart" in complaint("a/b")
    assert all(path.endswith("config.json") for _, path, _, _ in fake.requests)
    assert list(load.CLASSES) == list(hub.KINDS)


def test_hostile_index(fake, weights, tiny):
    for shard in ("../../secret", "/etc/passwd", "a/b", 5, ""):
        index = json.dumps({"weight_map": {"wte": shard}}).encode()
        files = {**tiny, "model.safetensors.index.json": index}
        files.pop("model.safetensors")
        fake.repositories["a/b"] = files
        assert "expected a plain file name" in complaint("a/b")
    assert not (weights / "a" / "b").exists()


def test_an_answer_that_is_no_hubs(fake, weights, tiny):
    fake.repositories["a/b"] = tiny
    fake.trouble["config.json"] = [lambda handler, content, headers: send(handler, 200, {}, b"<html>log in</html>")]
    assert "not a file of the hub" in complaint("a/b")


def test_offline(weights, monkeypatch):
    begin = time.monotonic()
    message = complaint("gpt2-medium")
    assert time.monotonic() - begin < 5
    for what in (str(weights), str(hub_cache()), "cannot be reached", "give a model's folder", "'gpt2-medium'"):
        assert what in message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = complaint("gpt2-medium")
    assert "HF_HUB_OFFLINE" in message and str(weights) in message and str(hub_cache()) in message
    assert not weights.exists()


@pytest.mark.parametrize("answer", ["silent", "dripping headers"])
def test_server_that_does_not_answer(fake, monkeypatch, answer):
    def drip(handler):
        while answer == "dripping headers" and not fake.stop.wait(0.02):
            handler.wfile.write(b"x")
        fake.stop.wait(5)

    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    fake.answer = drip
    assert "cannot be reached (timed out" in complaint("gpt2")


@pytest.mark.parametrize("name", [
    "../up", "a/../b", "...", ".hidden", "a/.b", "/nowhere", "a//b", "a/b/c", "a\\b", "a--b", "a..b", "a b", "a\0b",
    "é", "-x", "a/", "/a", "n" * 97, "gpt2?x", "gpt2#x", "gpt2%2e", "a\n", "http://x/y", "~", "$HOME",
])  # fmt: skip
def test_names_that_are_none(fake, weights, name):
    (weights.parent / "up").mkdir()  # what a path out of weights/ would find
    weights.mkdir()
    assert not is_hub_name(name) and "no model" in complaint(name) and fake.requests == []


@pytest.mark.parametrize("key, value", [
    ("HF_ENDPOINT", "file:///etc"), ("HF_ENDPOINT", "huggingface.co"), ("HF_ENDPOINT", "http://a b"),
    ("HF_TOKEN", "a\r\nX: y"), ("HF_TOKEN", "tökén"), ("HF_TOKEN", "a b"),
])  # fmt: skip
def test_settings_that_make_no_sense(fake, monkeypatch, key, value):
    monkeypatch.setenv(key, value)
    assert key in complaint("gpt2") and fake.requests == []


def test_weights_folder_cannot_be_written(fake, weights, tiny):
    fake.repositories["openai-community/gpt2"] = tiny
    weights.write_text("a file")
    assert "cannot write" in complaint("gpt2")


# ---- what is there already ----


def test_resolve_model(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elsewhere = tmp_path / "elsewhere"
    for name in ("tiny", "small", "notes"):
        (weights / name).mkdir(parents=True)
    for name in ("tiny", "small"):
        (weights / name / "config.json").write_text("{}")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert resolve_model("tiny") == weights / "tiny"
    assert resolve_model(str(weights / "small")) == resolve_model(weights / "small") == weights / "small"
    assert model_name(weights / "tiny") == "tiny" and model_name(elsewhere) is model_name("/") is None
    (elsewhere / "tiny").mkdir()
    assert resolve_model("tiny").resolve() == elsewhere / "tiny"  # a path that is there goes before a name
    assert model_name(elsewhere / "tiny") is None
    for absent in ("gpt5", "", "a\0b", "n" * 5000):
        with pytest.raises(InputError, match=r"which has: small, tiny\)") as info:
            resolve_model(absent)
        assert repr(absent)[:900] in str(info.value) and str(weights) in str(info.value)
    with pytest.raises(InputError, match="config.json is a file: give the model's folder"):
        resolve_model(str(weights / "tiny" / "config.json"))


def test_weights_folder_is_the_repositorys():
    assert hub.WEIGHTS.name == "weights"
    assert (hub.WEIGHTS.parent / "minprefix" / "formats" / "hub.py").samefile(hub.__file__)


def write_snapshot(repository, files, commit=COMMIT):
    """What huggingface_hub has in its cache after a download."""
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_cache(weights, tiny, monkeypatch):
    repository = hub_cache() / "models--openai-community--gpt2"
    assert hub_cache() == weights.parent / "hf" / "hub"
    snapshot = write_snapshot(repository, tiny)
    assert resolve_model("gpt2") == resolve_model("openai-community/gpt2") == snapshot
    assert model_name(snapshot) == "openai-community/gpt2" and load.load_model("gpt2").config["n_embd"] == 32
    (weights / "gpt2").mkdir(parents=True)
    assert resolve_model("gpt2") == weights / "gpt2"  # weights/ goes before the cache
    (weights / "gpt2").rmdir()

    repository.rename(repository.with_name("models--gpt2"))  # as it is called by older versions
    snapshot = hub_cache() / "models--gpt2" / "snapshots" / COMMIT
    assert resolve_model("gpt2") == resolve_model("openai-community/gpt2") == snapshot
    monkeypatch.setenv("HF_HUB_CACHE", str(weights.parent / "moved"))
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(weights.parent / "older"))
    assert find_model("gpt2") is None and model_name(snapshot) is None
    shutil.move(weights.parent / "hf" / "hub", weights.parent / "older")
    monkeypatch.delenv("HF_HUB_CACHE")
    assert find_model("gpt2") == weights.parent / "older" / "models--gpt2" / "snapshots" / COMMIT


def test_incomplete_snapshots_do_not_count(weights, tiny):
    repository = hub_cache() / "models--a--b"
    snapshot = write_snapshot(repository, needed(tiny))
    assert find_model("a/b") == snapshot
    for name in NEEDED - {"generation_config.json"}:  # huggingface_hub fetches only what a program asks for
        link = os.readlink(snapshot / name)
        (snapshot / name).unlink()
        assert find_model("a/b") is None, name
        (snapshot / name).symlink_to("../../blobs/nowhere")
        assert find_model("a/b") is None, name
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(link)
    (snapshot / "model.safetensors").unlink()
    for shards, expected in ((["config.json"], snapshot), (["config.json", "gone"], None), (["../x"], None)):
        index = {"weight_map": {str(i): shard for i, shard in enumerate(shards)}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        assert find_model("a/b") == expected
    for reference in ("", "../..", "f" * 40, "\xff"):
        (repository / "refs" / "main").write_bytes(reference.encode("latin-1"))
        assert find_model("a/b") is None


def test_huggingface_hubs_own_cache(fake, weights, tiny, monkeypatch, tmp_path):
    """What the package itself downloads from the same server is found, and is the same."""
    package = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fake.repositories["my/gpt2"] = tiny
    for name in sorted(NEEDED):  # vocab.json is the last
        assert find_model("my/gpt2") is None
        path = package.hf_hub_download("my/gpt2", name, endpoint=fake.url, cache_dir=hub_cache())
    snapshot = Path(path).parent
    assert resolve_model("my/gpt2") == snapshot and model_name(snapshot) == "my/gpt2"
    shutil.rmtree(hub_cache())
    assert contents(resolve_model("my/gpt2")) == needed(tiny)


def test_a_misspelt_name_is_told_what_it_may_mean(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, meant in (("gpt2-mni", "(did you mean gpt2-mini?)"), ("gpt2-lagre", "(did you mean gpt2-large?)")):
        with pytest.raises(InputError, match=re.escape(f"no model {name!r} {meant}: ")):
            resolve_model(name)
    for name in ("zzzzzz", "gpt2"):  # a name that is known needs no other
        with pytest.raises(InputError, match=f"no model '{name}'(: | \\(did you mean gpt2-)"):
            resolve_model(name)
