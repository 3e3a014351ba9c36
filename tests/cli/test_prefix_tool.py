"""python -m minprefix show: what it says of each kind of file, and the attention it reports against NumPy's."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from minprefix import Prefix, load_model
from minprefix.cli import prefix_tool
from minprefix.core.batches import collate
from minprefix.core.prefix import fingerprint
from minprefix.core.prefix_kv import KVInfix
from minprefix.formats.load import save_model
from minprefix.formats.prefix_file import save_prefix
from minprefix.formats.tokenizer import load_tokenizer
from minprefix.methods.baselines import Adapters, Infix
from minprefix.methods.files import load_trained, save_trained
from minprefix.system.errors import InputError
from tests.helpers import call, singles
from tests.tiny import ROOT, write_tiny_bart, write_tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny models; a prefix, an infix, an embedding-only prompt and adapters of them."""
    folder = tmp_path_factory.mktemp("show")
    write_tiny_model(folder / "gpt2")
    write_tiny_bart(folder / "bart")
    gpt2, bart = load_model(folder / "gpt2"), load_model(folder / "bart")
    torch.manual_seed(3)
    for name, model, trainable in (("gpt2", gpt2, Prefix(gpt2, 5, 0, 2)), ("bart", bart, Prefix(bart, 5, 0)),
                               ("infix", gpt2, Infix(gpt2, 3, 0))):  # fmt: skip
        method = "infix" if name == "infix" else "prefix"
        info = {"base_model": str(folder / ("bart" if name == "bart" else "gpt2")), "method": method}
        save_prefix(folder / f"{name}.safetensors", trainable.fold(), model, info)
    words = gpt2.wte.weight[load_tokenizer(folder / "gpt2").encode(" restaurant")[:1]]
    info = {"base_model": str(folder / "gpt2"), "method": "embedding", "task": "a\x1b[2Jb\nc"}
    save_trained(folder / "embedding.safetensors", {"embedding": 3 * words}, fingerprint(gpt2), info)
    adapters = Adapters(gpt2, 2).fold()
    save_trained(folder / "adapter.safetensors", adapters, fingerprint(gpt2), {**info, "method": "adapter"})
    return folder


@pytest.fixture(autouse=True)
def in_world(world, monkeypatch):
    monkeypatch.chdir(world)


def share_by_numpy(q, keys, prefix_keys, heads, causal, shown):
    """q (T, C), keys (S, C), prefix_keys (H, P, D) -> (H,): the prefix's part of the softmax, mean over `shown`."""
    q, keys = (x.reshape(len(x), heads, -1).transpose(1, 0, 2) for x in (q, keys))  # (H, T or S, D)
    scores = q @ np.concatenate([prefix_keys, keys], axis=1).transpose(0, 2, 1) / np.sqrt(q.shape[2])
    if causal:
        P = prefix_keys.shape[1]
        scores[:, np.arange(q.shape[1])[:, None] + P < np.arange(scores.shape[2])] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return (weights[:, :, : prefix_keys.shape[1]].sum(axis=2) / weights.sum(axis=2))[:, shown].mean(axis=1)


@pytest.mark.parametrize("name, method", [("gpt2", "prefix"), ("bart", "prefix")])
def test_shares_are_those_of_the_definition(name, method, world):
    model, tokenizer = load_model(name).double(), load_tokenizer(name)
    torch.manual_seed(4)
    prefix = Prefix(model, 5, 0).fold()
    batch = collate(singles([([11, 12, 13, 14], [21, 22, 23])]), tokenizer, model)
    outputs = {}
    for key, module in model.named_modules():
        module.register_forward_hook(lambda module, x, y, key=key: outputs.__setitem__(key, y))
    shares = prefix_tool.attention_shares(model, prefix, batch)
    assert set(shares) == set(model.prefix_sites)
    for site, modules in prefix_tool.attention_modules(model).items():
        assert shares[site].shape == model.prefix_sites[site][:2]
        for layer, module in enumerate(modules):
            key = next(key for key, other in model.named_modules() if other is module)
            if name == "gpt2":
                q, keys, _ = outputs[f"{key}.c_attn"][0].numpy().reshape(-1, 3, 32).transpose(1, 0, 2)
            else:
                q, keys = (outputs[f"{key}.{part}_proj"][0].numpy() for part in "qk")
            shown = slice(4, 7) if name == "gpt2" else slice(None)  # GPT-2: the separator and two tokens of the target
            expected = share_by_numpy(q, keys, prefix[site][layer, 0].numpy(), module.n_head, site == "decoder", shown)
            np.testing.assert_allclose(shares[site][layer], expected, rtol=0, atol=1e-12)
            assert expected.min() > 0.01 and expected.max() < 0.99


def test_an_infix_is_seen_by_the_target_alone(world):
    model, tokenizer = load_model("gpt2"), load_tokenizer("gpt2")
    infix = KVInfix(Prefix(model, 3, 0).fold().kv, 3)
    batch = collate(singles([([11, 12, 13, 14], [21, 22, 23])]), tokenizer, model)
    assert (prefix_tool.attention_shares(model, infix, batch)["decoder"] > 0.01).all()
    batch.target_positions = torch.arange(4)
    assert (prefix_tool.attention_shares(model, infix, batch)["decoder"] == 0).all()


def test_no_hook_is_left(world):
    model, tokenizer = load_model("gpt2"), load_tokenizer("gpt2")
    prefix_tool.attention_shares(model, Prefix(model, 3, 0).fold(), collate(singles([([1], [2])]), tokenizer, model))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "bart", "infix"])
def test_a_prefix_is_described_and_mapped(name, capsys):
    code, out, err = call(prefix_tool, capsys, "show", f"{name}.safetensors")
    assert code == 0 and "mean over the" in out and "% of the attention" not in out, err
    length, offset = (3, 3) if name == "infix" else (5, 2 if name == "gpt2" else 5)
    assert f"position offset   {offset}\n" in out and f"length {length}, 2 layers, 4 heads of dimension 8\n" in out
    code, out, err = call(prefix_tool, capsys, "show", f"{name}.safetensors", "--input", "An inn")
    assert code == 0 and out.count("% of the attention") == (3 if name == "bart" else 1), err


def test_norms(world, capsys):
    model = load_model("gpt2")
    prefix = Prefix(model, 2, 0).fold()
    prefix["decoder"].zero_()
    prefix["decoder"][1, 0, :, 0] = 3.0  # one of two keys of layer 2: sqrt(32 * 9) / 2
    save_prefix("norms.safetensors", prefix, model, {})
    lines = call(prefix_tool, capsys, "show", "norms.safetensors")[1].splitlines()
    assert [line.split() for line in lines[-2:]] == [["1", "0.000", "0.000"], ["2", "8.485", "0.000"]]


def test_the_nearest_words_of_an_embedding_only_prompt(capsys):
    code, out, err = call(prefix_tool, capsys, "show", "embedding.safetensors")
    tokenizer = load_tokenizer("gpt2")
    word = tokenizer.decode(tokenizer.encode(" restaurant")[:1])
    assert code == 0 and out.splitlines()[-1].startswith(f"    1  {word!r} 1.00  "), (out, err)
    assert "\x1b" not in out and r"a\u001b[2Jb\nc" in out  # metadata does not steer the terminal


def test_adapters_are_described(capsys):
    code, out, _ = call(prefix_tool, capsys, "show", "adapter.safetensors")
    assert code == 0 and "method            adapter" in out and "648 numbers" in out, out


def test_the_map_as_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws with matplotlib: pip install -e '.[plot]'")
    code, _, err = call(
        prefix_tool, capsys, "show", "bart.safetensors", "--input", "An inn", "--plot", tmp_path / "map.png"
    )
    assert code == 0 and (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG"), err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("none", "nothing at none"),
        ("adapter.safetensors --input x", "is of --method adapter"),
        ("gpt2.safetensors --input x --model bart", "was made for"),
        ("gpt2.safetensors --input x --plot a.png", "--plot needs matplotlib"),
        ("gpt2/model.safetensors", "is no file of minprefix's train.py"),
        ("norms-no-model.safetensors --input x", "does not name its base model"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, world, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = load_model("gpt2")
    save_prefix("norms-no-model.safetensors", Prefix(model, 2, 0).fold(), model, {})
    code, _, err = call(prefix_tool, capsys, "show", *arguments.split())
    assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_a_source_is_cut_as_in_training(world, capsys):
    model = load_model("gpt2")
    info = {"base_model": "gpt2", "max_source": "4"}
    save_prefix("short.safetensors", Prefix(model, 2, 0).fold(), model, info)
    maps = []
    for text in ("a b c d e f g h " * 99, "a b c d e f g h"):
        code, out, err = call(prefix_tool, capsys, "show", "short.safetensors", "--input", text)
        assert code == 0, err
        maps.append(out[out.index("written  ") :])
    assert maps[0] == maps[1]


def test_runs_of_other_methods_and_unfinished_ones_are_told(world, capsys, tmp_path):
    told = {"task": "e2e"}
    save_model(load_model("gpt2"), tmp_path / "finetuned" / "model", info=told)
    (tmp_path / "infix").mkdir()
    shutil.copy("infix.safetensors", tmp_path / "infix")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "checkpoint.pt").touch()
    for run, said in ("finetuned", "is of --method finetune"), ("begun", "has not ended: go on with it"):
        code, _, err = call(prefix_tool, capsys, "show", tmp_path / run)
        assert code == 2 and said in err and len(err.splitlines()) == 1, err
    for run, said in ("finetuned", "is of --method finetune: only a prefix"), ("infix", "is of --method infix: only"):
        code, _, err = call(prefix_tool, capsys, "export", "--prefix", tmp_path / run, "--to", tmp_path / "never")
        assert code == 2 and said in err and not (tmp_path / "never").exists(), err
    with pytest.raises(InputError, match="is a fine-tuned model: load_model loads it"):
        load_trained(tmp_path / "finetuned" / "model", load_model("gpt2"))


@pytest.mark.slow
def test_the_package_is_the_command(world):
    command = [sys.executable, "-m", "minprefix", "show", "gpt2.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "") and "length" in done.stdout


@pytest.mark.parametrize("arguments, message", [("", "COMMAND"), ("shw", "'shw'"), ("export --to x", "--prefix")])
def test_a_wrong_command_line_is_one_line_that_leads_to_the_help(arguments, message, capsys):
    code, _, err = call(prefix_tool, capsys, *arguments.split())
    assert code == 2 and err.startswith("error: ") and message in err and "--help" in err, err
    assert len(err.splitlines()) == 1
