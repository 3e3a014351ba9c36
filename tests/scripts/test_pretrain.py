"""weights/pretrain.py: what BART has to restore, and whole small runs of both objectives, stopped and resumed."""

import json
import lzma
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minprefix import generate, load_model, load_tokenizer
from minprefix.system.errors import run_main
from tests.tiny import ROOT

sys.path.insert(0, str(ROOT / "weights"))
import pretrain  # noqa: E402

pytestmark = pytest.mark.slow

TEXT = (
    "The Golden Lantern opened in 1901. It burnt down twice! Was it rebuilt? It was, at 3.5 times the size.\n"
    '"A fine house," they said. Dr. Smith lives there now'
)


@pytest.fixture(scope="module")
def bart_mini(tmp_path_factory):
    """A folder with the vocabulary of a BART, and a small corpus as its ids."""
    out = tmp_path_factory.mktemp("bart") / "model"
    pretrain.bart_vocabulary(SimpleNamespace(bpe=ROOT / "weights" / "gpt2-mini", out=out))
    tokenizer = load_tokenizer(out)
    documents = [[*tokenizer.encode(f"{TEXT} {i}."), tokenizer.end_id] for i in range(60)]
    return out, tokenizer, np.array(sum(documents, []), np.uint16)


def test_the_vocabulary_is_the_same_bpe_in_barts_order(bart_mini):
    _, tokenizer, _ = bart_mini
    gpt2 = load_tokenizer(ROOT / "weights" / "gpt2-mini")
    assert tokenizer.special == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4099}
    assert tokenizer.vocab_size == gpt2.vocab_size + 4  # five special tokens for one
    assert tokenizer.encode(TEXT) == [i + 4 for i in gpt2.encode(TEXT)]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_sentence_starts(bart_mini):
    _, tokenizer, _ = bart_mini
    ids = np.array([*tokenizer.encode(TEXT), tokenizer.end_id, *tokenizer.encode("Next.")], np.uint16)
    cuts = pretrain.sentence_starts(ids, tokenizer)
    sentences = [tokenizer.decode(part.tolist()).strip() for part in np.split(ids, cuts)]
    assert sentences == [
        "The Golden Lantern opened in 1901.", "It burnt down twice!", "Was it rebuilt?",
        "It was, at 3.5 times the size.", '"A fine house," they said.', "Dr.", "Smith lives there now</s>", "Next.",
    ]  # fmt: skip


def test_infilling_masks_spans_of_three_tokens_on_average_and_thirty_percent_in_all():
    rng, mask = np.random.default_rng(0), -9
    removed, spans = 0, []
    for n in [1, 2, 3, 10, *[200] * 300]:
        tokens = np.arange(n)
        noised = pretrain.infill(tokens, mask, rng)
        kept = [t for t in noised if t != mask]
        assert kept == sorted(set(kept)) and set(kept) <= set(range(n))  # the order stays
        assert n - len(kept) == round(0.3 * n)
        assert all(a != mask or b != mask for a, b in zip(noised, noised[1:], strict=False))  # no span touches another
        if n == 200:
            removed += n - len(kept)
            bounded = [-1, *noised, n]
            at = [i for i, t in enumerate(bounded) if t == mask]
            spans += [bounded[i + 1] - bounded[i - 1] - 1 for i in at]
    assert removed == 300 * 60 == sum(spans)
    assert 2.8 < np.mean(spans) < 3.1 and 0.03 < np.mean(np.array(spans) == 0) < 0.08  # Poisson(3): 5% insertions


def test_a_denoising_batch(bart_mini):
    out, tokenizer, ids = bart_mini
    args = SimpleNamespace(out=out, batch_size=4, length=64, positions=140)
    batches = pretrain.denoising(args, ids, seed=3)
    for step in range(12):
        (source, inputs, real), labels, start = batches(step)
        again = batches(step)
        assert torch.equal(source, again[0][0]) and torch.equal(labels, again[1]) and start == again[2]
        B, T = [(16, 16), (8, 32), (4, 64), (2, 128)][step % 4]
        assert len(source) == len(inputs) == len(labels) == B and labels.size(1) <= T and 0 <= start < min(64, 141 - T)
        assert torch.equal(real == 1, source != tokenizer.pad_id)
        for row in range(B):
            target = labels[row][labels[row] != pretrain.IGNORE].tolist()
            assert (target[0], target[-1]) == (0, 2) and set(target[1:-1]).isdisjoint({0, 1, 2, 3, 4099})
            assert inputs[row, : len(target)].tolist() == [2, *target[:-1]]
            seen = source[row][real[row] == 1].tolist()
            assert (seen[0], seen[-1]) == (0, 2) and 4099 in seen
            kept = [t for t in seen[1:-1] if t != 4099]
            assert len(target) - 2 - len(kept) == round(0.3 * (len(target) - 2))
            counts = np.bincount(target, minlength=4100) - np.bincount(kept, minlength=4100)
            assert counts[3:].min() >= 0  # nothing is in the source that is not in the target
            text = tokenizer.decode(target[1:-1])
            assert text.strip()[0] in 'TIW"DS' and (text.strip()[-1] in '.!?"' or len(target) == T)  # whole sentences


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, args)])
    run_main(pretrain.main)


def write_corpus(folder):
    folder.mkdir()
    for split, n in (("pretrain", 200), ("heldout", 40)):
        with lzma.open(folder / f"{split}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("<|endoftext|>".join(f"{TEXT} {i}." for i in range(n)))
    return folder


def test_another_corpus_is_encoded_anew_and_no_run_goes_on_with_it(bart_mini, tmp_path):
    out, tokenizer, _ = bart_mini
    one, two = write_corpus(tmp_path / "one"), write_corpus(tmp_path / "two")
    with lzma.open(two / "pretrain.txt.xz", "wt", encoding="utf-8") as file:
        file.write("Another text.")
    rest = dict.fromkeys(("what", "layers", "width", "heads", "positions", "length", "batch_size", "seed"))
    first, second = (SimpleNamespace(out=out, state=tmp_path, corpus=corpus, **rest) for corpus in (one, two))
    ids = pretrain.corpus_ids(first, "pretrain")
    assert tokenizer.decode(pretrain.corpus_ids(second, "pretrain")[:-1].tolist()) == "Another text."
    files = set(tmp_path.glob("*.npy"))
    assert np.array_equal(pretrain.corpus_ids(first, "pretrain"), ids) and set(tmp_path.glob("*.npy")) == files
    settings = [pretrain.settings(args) for args in (first, second)]
    assert [key for key in settings[0] if settings[0][key] != settings[1][key]] == ["corpus"]


def test_help_is_a_page(monkeypatch, capsys):
    """In groups, a line for each option, as that of train.py."""
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--help")
    out = capsys.readouterr().out
    options = set(re.findall(r'add\("(--[\w-]+)"', (ROOT / "weights" / "pretrain.py").read_text(encoding="utf-8")))
    assert len(options) == 21 and options == set(re.findall(r"^  (--[\w-]+) [A-Z]+ +\S", out, re.M))
    assert len(re.findall(r"^[a-z' ]+:$", out, re.M)) >= 4 and max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("gpt3", "invalid choice: 'gpt3'"),
        ("gpt2", "required: --corpus, --out"),
        ("gpt2 --corpus corpus --out out --widht 1", "unrecognized arguments: --widht 1"),
        ("gpt2 --corpus corpus --out out --layers 0", "--layers is 0: it must be above 0"),
        ("bpe --corpus corpus --out out --vocab-size 70000", "--vocab-size is 70000"),
        ("gpt2 --corpus corpus --out out --length 600", "rows of 600 tokens do not fit 512 positions"),
        ("gpt2 --corpus corpus --out out", "out has no vocab.json: train a BPE first"),
        ("bart --corpus corpus --out out", "give --bpe"),
        ("bart --corpus corpus --out out --bpe corpus", "corpus has no vocab.json"),
        ("bart --corpus nowhere --out bart --bpe BPE", "nowhere/pretrain.txt.xz is missing"),
        ("bart --corpus broken --out bart --bpe BPE", "broken/pretrain.txt.xz is not UTF-8 text compressed by xz"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    write_corpus(tmp_path / "broken")
    path = tmp_path / "broken" / "pretrain.txt.xz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments.replace("BPE", str(ROOT / "weights" / "gpt2-mini")).split())
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


@pytest.fixture
def without_compiling():
    """It would take nearly two minutes."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("what", ["gpt2", "bart"])
def test_a_small_run_learns_resumes_and_exports_what_loads(tmp_path, monkeypatch, what):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "model"
    if what == "gpt2":
        out.mkdir()
        for name in ("vocab.json", "merges.txt"):
            (out / name).write_bytes((ROOT / "weights" / "gpt2-mini" / name).read_bytes())
    args = [what, "--corpus", corpus, "--out", out, "--bpe", ROOT / "weights" / "gpt2-mini", "--state", tmp_path / "s",
            "--layers", 1, "--width", 32, "--heads", 2, "--positions", 64, "--length", 32, "--batch-size", 4,
            "--eval-every", 10, "--lr", 1e-2]  # fmt: skip
    run(monkeypatch, *args, "--tokens", 30 * 128)
    run(monkeypatch, *args, "--tokens", 60 * 128)  # goes on from step 30
    log = [json.loads(line) for line in (out / "pretraining.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in log] == [128 * step for step in (10, 20, 30, 40, 50, 60)]
    assert log[-1]["heldout"] < log[0]["heldout"] - 0.5
    assert ("copying" in log[-1]) == (what == "gpt2")
    model, tokenizer = load_model(out), load_tokenizer(out)
    assert model.encoder_decoder == (what == "bart") and model.config["dtype"] == "float16"
    assert len(generate(model, tokenizer, ["It burnt down"], beams=2, max_new_tokens=5)) == 1
    for option, value in (("--seed", 5), ("--batch-size", 8), ("--length", 16)):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, *args, "--tokens", 60 * 128, option, value)
    state = (tmp_path / "s" / "state.pt").read_bytes()
    (tmp_path / "s" / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *args, "--tokens", 60 * 128)
    # A finished model's folder is where another run may start from.
    run(monkeypatch, *args, "--tokens", 10 * 128, "--init", out, "--state", tmp_path / "s2", "--lr", 1e-6)
    again = json.loads((out / "pretraining.jsonl").read_text().splitlines()[-1])
    assert again["tokens"] == 1280 and abs(again["heldout"] - log[-1]["heldout"]) < 0.1


def test_copying_loss_is_of_the_second_copy():
    class Copier:  # sees nothing coming in the first copy, knows all of the second
        config, n_positions = {"vocab_size": 11}, 64

        def hidden_states(self, ids, start):
            sure = 60.0 * F.one_hot(ids, 11)
            return torch.cat([torch.zeros(len(ids), 31, 11), sure[:, : ids.size(1) - 31]], dim=1)

        def logits(self, states):
            return states

    ids = np.arange(500, dtype=np.uint16) % 10
    assert max(pretrain.copying_loss(Copier(), ids, "cpu").values()) < 1e-6
    Copier.hidden_states = lambda self, ids, start: torch.zeros(*ids.shape, 11)
    assert pretrain.copying_loss(Copier(), ids, "cpu") == pytest.approx({"text": math.log(11), "random": math.log(11)})
