"""A model's name leads to a folder, or to one line; huggingface_hub downloads from the test's server."""

import errno
import hashlib
import http.server
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from minprefix.formats import hub, load
from minprefix.formats.hub import find_model, hub_cache, is_hub_name, model_name, resolve_model
from minprefix.formats.safetensors import read_tensors, write_safetensors
from minprefix.formats.tokenizer import load_tokenizer
from minprefix.system.errors import InputError, WriteError
from tests.tiny import ROOT, write_tiny_model

try:
    import huggingface_hub
except ImportError:
    huggingface_hub = None

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json"}
OTHERS = {"README.md": b"# A model", "pytorch_model.bin": b"never read", "tf_model.h5": b"x", "onnx/config.json": b"{}"}


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves repositories (name -> file name -> bytes) as huggingface.co does, as far as huggingface_hub asks here.

    refuse: (status, X-Error-Code) of each answer; requests: (method, path, Authorization).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.requests, self.refuse = {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def contents(self):
        """The paths whose contents were sent."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if "/resolve/" in path and method == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = urlsplit(self.path).path
        found = re.fullmatch("(?:/api/models)?/(?!api/)([^/]+/[^/]+)(?:/(revision|tree|resolve)/[^/]+/?(.*))?", path)
        if not found:  # what the package asks besides
            return self.send(404)
        self.server.requests.append((self.command, path, self.headers["Authorization"]))
        name, kind, file_name = found.groups()
        files = self.server.repositories.get(name)
        if self.server.refuse or files is None:
            return self.send(*(self.server.refuse or (404, "RepoNotFound")))
        if kind in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            return self.send(200, body=json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        if kind == "tree":
            sizes = {path: {"size": len(content), "oid": sha1(content)} for path, content in files.items()}
            entries = [{"type": "file", "path": path, **about} for path, about in sizes.items()]
            return self.send(200, body=json.dumps(entries).encode())
        headers = {"ETag": f'"{sha1(files[file_name])}"', "X-Repo-Commit": COMMIT}
        start = int(re.sub(r"\D", "", self.headers["Range"] or "0"))  # "bytes=100-"
        self.send(206 if start else 200, body=files[file_name][start:], headers=headers)

    do_HEAD = do_GET

    def send(self, status, error="", body=b"", headers=()):
        self.send_response(status)
        for key, value in {"X-Error-Code": error, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty `weights/`, an empty HuggingFace cache, an empty current directory, no huggingface_hub."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(hub, "WEIGHTS", home / "weights")
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return home / "weights"


@pytest.fixture
def package(weights, monkeypatch):
    """huggingface_hub, with an HF_ENDPOINT where nobody answers."""
    if not huggingface_hub:
        pytest.skip("downloads need huggingface_hub: pip install -e '.[hub]'")
    monkeypatch.setitem(sys.modules, "huggingface_hub", huggingface_hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)


def use_endpoint(url, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def fake(package, monkeypatch):
    server = FakeHub()
    use_endpoint(server.url, monkeypatch)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """File name -> bytes of a tiny GPT-2, and what else such a repository has."""
    folder = write_tiny_model(tmp_path_factory.mktemp("hub") / "tiny")
    return {**contents(folder), "generation_config.json": b'{"eos_token_id": 50256}', **OTHERS}


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
    assert folder == hub_cache() / "models--openai-community--gpt2-medium" / "snapshots" / COMMIT
    assert contents(folder) == needed(tiny) and sorted(fake.contents()) == sorted(NEEDED)  # each of them once
    assert {token for _, _, token in fake.requests} == {"Bearer hf_secret"}
    out, err = capsys.readouterr()
    assert out == "" and "hf_secret" not in err
    assert err.startswith(f"downloading openai-community/gpt2-medium to {hub_cache()}\n")

    before = len(fake.requests)
    assert resolve_model("gpt2-medium") == resolve_model("openai-community/gpt2-medium") == folder
    assert load.load_model("gpt2-medium").config["n_embd"] == 32 and load_tokenizer("gpt2-medium").encode("a")
    assert model_name(folder) == "openai-community/gpt2-medium" and len(fake.requests) == before
    assert not weights.exists()


@pytest.mark.parametrize("kind", ["safetensors shards", "bin", "bin shards"])
def test_other_forms_of_the_weights(fake, tiny, tmp_path, kind):
    whole, folder = tmp_path / "whole", tmp_path / "other"
    whole.mkdir()
    folder.mkdir()
    (whole / "model.safetensors").write_bytes(tiny["model.safetensors"])
    tensors = read_tensors(whole)
    halves = [dict(list(tensors.items())[half::2]) for half in (0, 1)] if "shards" in kind else [tensors]
    ending, stem = ("bin", "pytorch_model") if "bin" in kind else ("safetensors", "model")
    names = [f"{stem}{f'-0000{i}-of-00002' if 'shards' in kind else ''}.{ending}" for i in range(len(halves))]
    for name, half in zip(names, halves, strict=True):
        write_safetensors(folder / name, half) if ending == "safetensors" else torch.save(half, folder / name)
    if "shards" in kind:
        index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    rest = {name: tiny[name] for name in ("config.json", "vocab.json", "merges.txt")}
    fake.repositories["my/model"] = {"README.md": b"", **rest, **contents(folder)}
    assert contents(resolve_model("my/model")) == {**rest, **contents(folder)}
    found = read_tensors(find_model("my/model"))
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)


@pytest.mark.slow
def test_several_processes_at_once(fake, weights, tiny):
    """Each set up by environment variables alone; huggingface_hub looks for its cache in the same place."""
    program = (
        "from huggingface_hub.constants import HF_HUB_CACHE; from minprefix.formats.hub import *\n"
        "assert Path(HF_HUB_CACHE) == hub_cache(); print(resolve_model('my/gpt2'))"
    )
    fake.repositories["my/gpt2"] = tiny
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {Path(process.communicate(timeout=100)[0].strip()) for process in processes}
    assert folders == {find_model("my/gpt2")} and contents(find_model("my/gpt2")) == needed(tiny)


# ---- what cannot be downloaded ----


@pytest.mark.parametrize(
    "refuse, parts",
    [
        ((404, "RepoNotFound"), "does not exist, or is private: check the name|HF_TOKEN"),
        ((404, ""), "does not exist, or is private: check the name"),
        ((404, "RevisionNotFound"), "has no revision main"),
        ((401, "RepoNotFound"), "does not exist, or is private"),
        ((401, ""), "refuses access (401): check the name, and correct or remove the token|HF_TOKEN"),
        ((403, "GatedRepo"), "is gated: accept its terms there|HF_TOKEN|hf auth login"),
        ((403, ""), "refuses access (403)"),
        ((500, ""), "failed|500|HF_ENDPOINT|give a model's folder"),
    ],
)
def test_refusals(fake, weights, monkeypatch, refuse, parts):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake.refuse = refuse
    message = complaint("nobody/nothing")
    for part in (*parts.split("|"), f"{fake.url}/nobody/nothing", str(weights), str(hub_cache())):
        assert part in message
    assert "hf_secret" not in message and find_model("nobody/nothing") is None


@pytest.mark.parametrize("lacking, reason", [
    ("vocab.json", "lacks config.json, or vocab.json and merges.txt, or tokenizer.json"),
    ("config.json", "lacks config.json"), ("model.safetensors pytorch_model.bin", "lacks weights"),
])  # fmt: skip
def test_incomplete_repository(fake, tiny, lacking, reason):
    fake.repositories["a/b"] = {name: content for name, content in tiny.items() if name not in lacking.split()}
    assert reason in complaint("a/b") and fake.contents() == []


def test_a_model_of_another_kind_is_refused_before_its_weights(fake, tiny):
    fake.repositories["a/b"] = {**tiny, "config.json": b'{"model_type": "llama"}'}
    assert "'llama' model, minprefix runs gpt2 and bart" in complaint("a/b")
    assert fake.contents() == ["config.json"] and list(load.CLASSES) == list(hub.KINDS)


def test_no_network(package, weights, tiny, monkeypatch):
    write_snapshot(hub_cache() / "models--openai-community--gpt2-medium", {"config.json": tiny["config.json"]})
    message = complaint("gpt2-medium")  # of which a part is in the cache
    for what in (str(weights), str(hub_cache()), os.environ["HF_ENDPOINT"], "Connect", "check the network", "folder"):
        assert what in message
    use_endpoint("no.url", monkeypatch)
    assert "the download of no.url/openai-community/gpt2 failed" in complaint("gpt2")


def test_full_disk(fake, tiny):
    """A limit on the size of files stands for it; the next try completes the model."""
    fake.repositories["a/b"] = tiny
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(tiny["model.safetensors"]) - 1, before[1]))
    try:
        with pytest.raises(WriteError, match="cannot write .*: File too large; make room, or set HF_HUB_CACHE to"):
            resolve_model("a/b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_model("a/b") is None
    assert contents(resolve_model("a/b")) == needed(tiny)


def test_cache_that_cannot_be_written(fake, tiny):
    fake.repositories["a/b"] = tiny
    hub_cache().parent.mkdir()
    hub_cache().write_text("a file")
    message = complaint("a/b")
    assert f"cannot write {hub_cache()}" in message and os.strerror(errno.ENOTDIR) in message


def test_a_token_does_not_appear_in_the_message(fake, monkeypatch):
    for token in ("hf_se\1cret", "hf_s\xe9cret", "hf_se cret"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert "hf_s" not in complaint("gpt2") and "cret" not in complaint("gpt2")


def test_without_the_package(weights, tiny):
    assert "nor a complete one" in complaint("gpt2-medium")
    assert "the download needs huggingface_hub" in complaint("gpt2-medium")
    assert "pip install -e '.[hub]'" in complaint("gpt2-medium")


def test_offline(weights, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
        message = complaint("gpt2-medium")
        assert "HF_HUB_OFFLINE forbids a download" in message and str(hub_cache()) in message
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("name", [
    "../up", "a/../b", "...", ".hidden", "a/.b", "/nowhere", "a//b", "a/b/c", "a\\b", "a--b", "a..b", "a b", "a\0b",
    "é", "-x", "a/", "/a", "n" * 97, "gpt2?x", "gpt2#x", "gpt2%2e", "a\n", "http://x/y", "~", "$HOME",
])  # fmt: skip
def test_names_that_are_none(weights, name):
    (weights.parent / "up").mkdir()  # what a path out of weights/ would find
    weights.mkdir()
    assert not is_hub_name(name) and "no model" in complaint(name) and "download" not in complaint(name)


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
    snapshot = write_snapshot(repository, needed(tiny))
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


def test_a_misspelt_name_is_told_what_it_may_mean(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, meant in (("gpt2-mni", "(did you mean gpt2-mini?)"), ("gpt2-lagre", "(did you mean gpt2-large?)")):
        with pytest.raises(InputError, match=re.escape(f"no model {name!r} {meant}: ")):
            resolve_model(name)
    for name in ("zzzzzz", "gpt2"):  # a name that is known needs no other
        with pytest.raises(InputError, match=f"no model '{name}'(: | \\(did you mean gpt2-)"):
            resolve_model(name)
