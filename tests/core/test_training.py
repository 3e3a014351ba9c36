import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from minprefix import Prefix, load_model, load_tokenizer
from minprefix.core import training
from minprefix.core.batches import collate
from minprefix.core.checkpointing import read_checkpoint
from minprefix.core.encode import encode_pairs
from minprefix.core.loss import target_loss
from minprefix.core.muon import Muon
from minprefix.core.training import batch_stream, dev_loss, linear_schedule, make_optimizer, train
from minprefix.data.tasks import Example
from minprefix.system.errors import InputError, OutOfMemory
from tests.helpers import pairs_of, singles
from tests.tiny import ROOT, write_tiny_bart, write_tiny_model

PAIRS = [([5 + i, 6, 7 + i], [40 + i, 50, 60, 4095]) for i in range(12)] + [([9], [8, 4095])]


BART_PAIRS = [([0, *source, 2], [0, *target[:-1], 2]) for source, target in PAIRS]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def bart_folder(tmp_path_factory):
    return write_tiny_bart(tmp_path_factory.mktemp("models") / "bart", decoder_start_token_id=3)


def run(folder, out, steps=20, pairs=PAIRS, **options):
    torch.manual_seed(1)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prefix = Prefix(model, 3, mlp_width=8)
    dev = pairs[:4]
    log = train(model, prefix, tokenizer, pairs, dev, out, steps=steps, batch_size=4, lr=1e-2, eval_every=5, **options)
    return model, prefix, log


def test_loss_is_that_of_the_target_tokens_alone(model_folder):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    prefix = Prefix(model, 3, mlp_width=0)()
    batch = collate(singles(PAIRS), tokenizer, model)
    expected = 0.0
    for source, target in PAIRS:  # one row at a time, over the whole sequence, source positions left out by hand
        ids = torch.tensor([[*source, tokenizer.end_id, *target]])
        log_probs = model(ids, prefix)[0].log_softmax(-1)
        expected -= sum(log_probs[len(source) + i, token] for i, token in enumerate(target))
    assert target_loss(model, batch, prefix).item() == pytest.approx(expected.item(), rel=1e-5)
    tokens = sum(len(target) for _, target in PAIRS)
    loss = dev_loss(model, lambda: prefix, PAIRS, tokenizer, batch_size=5)
    assert loss == pytest.approx(expected.item() / tokens, rel=1e-5)


def test_training_lowers_the_loss_and_leaves_the_model_alone(model_folder, tmp_path):
    before = {name: p.clone() for name, p in load_model(model_folder).state_dict().items()}
    model, prefix, (log, best_step) = run(model_folder, tmp_path, steps=60)
    assert log[-1]["dev_loss"] < log[0]["dev_loss"] - 0.1
    assert [row["step"] for row in log] == [0, *range(5, 61, 5)]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == log
    tokenizer = load_tokenizer(model_folder)
    best = next(row["dev_loss"] for row in log if row["step"] == best_step)
    assert best == min(row["dev_loss"] for row in log)  # the best prefix is the one that is left, not the last
    assert dev_loss(model, prefix, PAIRS[:4], tokenizer, 4) == pytest.approx(best, rel=1e-6)


def test_one_step_is_adamw_on_the_sentence_mean(model_folder, tmp_path):
    torch.manual_seed(1)
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    prefix = Prefix(model, 3, mlp_width=8)
    kv = {name: p.detach().clone().requires_grad_() for name, p in prefix.named_parameters()}
    loss = 0.0
    for source, target in PAIRS:
        logits = model(torch.tensor([[*source, 4095, *target[:-1]]]), torch.func.functional_call(prefix, kv))
        loss = loss + F.cross_entropy(logits[0, len(source) :], torch.tensor(target), reduction="sum")
    (loss / len(PAIRS)).backward()
    optimizer = torch.optim.AdamW(kv.values(), lr=1e-2, weight_decay=0.0)
    optimizer.step()
    train(model, prefix, tokenizer, PAIRS, PAIRS, tmp_path, steps=1, batch_size=len(PAIRS), lr=1e-2)
    for name, p in prefix.named_parameters():
        torch.testing.assert_close(p, kv[name], rtol=1e-3, atol=1e-5)


def bart_row_loss(model, source, target, prefix):
    """Of one pair, without padding and mask: nats, summed over the target's tokens."""
    logits = model(torch.tensor([source]), torch.tensor([[3, *target[:-1]]]), prefix=prefix)
    return F.cross_entropy(logits[0], torch.tensor(target), reduction="sum")


def test_loss_of_an_encoder_decoder_is_that_of_its_targets(bart_folder):
    model, tokenizer = load_model(bart_folder), load_tokenizer(bart_folder)
    prefix = Prefix(model, 3, mlp_width=0)()
    expected = sum(bart_row_loss(model, *pair, prefix) for pair in BART_PAIRS).item()
    loss = target_loss(model, collate(singles(BART_PAIRS), tokenizer, model), prefix).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    mean = dev_loss(model, lambda: prefix, BART_PAIRS, tokenizer, batch_size=5)
    assert mean == pytest.approx(expected / sum(len(target) for _, target in BART_PAIRS), rel=1e-5)


def test_gradient_of_an_encoder_decoder_is_of_the_token_mean(bart_folder, tmp_path, monkeypatch):
    """Seen by the optimizer before it is cut to the norm 1, since AdamW's first step hardly depends on its scale."""
    torch.manual_seed(1)
    model, tokenizer = load_model(bart_folder), load_tokenizer(bart_folder)
    prefix = Prefix(model, 3, mlp_width=8)
    losses = [bart_row_loss(model, *pair, prefix()) for pair in BART_PAIRS]
    (sum(losses) / sum(len(target) for _, target in BART_PAIRS)).backward()
    expected = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    seen, clip = {}, torch.nn.utils.clip_grad_norm_

    def look_and_clip(parameters, norm):
        seen.update({name: p.grad.clone() for name, p in prefix.named_parameters()})
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look_and_clip)
    train(model, prefix, tokenizer, BART_PAIRS, BART_PAIRS, tmp_path, steps=1, batch_size=len(BART_PAIRS), lr=1e-2)
    assert seen.keys() == expected.keys() and any("cross" in name for name in seen)
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_a_step_over_several_batches_is_one_over_the_larger_batch(kind, model_folder, bart_folder, tmp_path):
    """In float64, with parts of unequal lengths, and a last batch of an epoch that has fewer pairs than parts."""
    folder, pairs = {"gpt2": (model_folder, PAIRS), "bart": (bart_folder, BART_PAIRS)}[kind]
    tokenizer, results = load_tokenizer(folder), []
    for size, accumulate in ((8, 1), (2, 4), (4, 2), (1, 8)):
        torch.manual_seed(1)
        model = load_model(folder, dtype=torch.float64)
        prefix = Prefix(model, 3, mlp_width=8).double()
        out = tmp_path / f"{size}x{accumulate}"
        log, _ = train(model, prefix, tokenizer, pairs, pairs[:4], out, steps=7, batch_size=size, lr=1e-2,
                       eval_every=1, accumulate=accumulate)  # fmt: skip
        numbers = [row[key] for row in log for key in ("dev_loss", "loss", "epoch") if key in row]
        results.append((prefix.fold(), numbers))
    for kv, numbers in results[1:]:
        assert numbers == pytest.approx(results[0][1], rel=1e-6)
        for site in kv.kv:
            torch.testing.assert_close(kv[site], results[0][0][site], rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match="accumulate = 8, not 2"):
        train(model, prefix, tokenizer, pairs, pairs[:4], out, steps=7, batch_size=1, lr=1e-2, eval_every=1,
              accumulate=2, resume=True)  # fmt: skip


def test_training_an_encoder_decoder(bart_folder, tmp_path):
    before = {name: p.clone() for name, p in load_model(bart_folder).state_dict().items()}
    model, _, (log, _) = run(bart_folder, tmp_path, steps=60, pairs=BART_PAIRS)
    assert log[-1]["dev_loss"] < log[0]["dev_loss"] - 0.03  # its last layer norm leaves a prefix little to change
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_schedule_is_linear():
    assert [linear_schedule(s, 4, 0) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [linear_schedule(s, 6, 2) for s in range(7)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])


def test_a_warmup_that_leaves_no_step_to_decay_in_is_refused(model_folder, tmp_path):
    with pytest.raises(InputError, match="--warmup is 3: it must be less than the 3 steps"):
        run(model_folder, tmp_path, steps=3, warmup=3)
    assert not list(tmp_path.iterdir())
    run(model_folder, tmp_path, steps=3, warmup=2)


def test_stream_can_start_anywhere():
    def first(start):
        stream = batch_stream(PAIRS, 4, seed=3, start=start)
        return [pairs_of(next(stream)) for _ in range(12 - start)]

    whole = first(0)
    assert all(first(start) == whole[start:] for start in range(12))
    assert sorted(sum(whole[:4], [])) == sorted(PAIRS) == sorted(sum(whole[4:8], []))
    assert whole[:4] != whole[4:8]


def test_resuming_refuses_other_settings_and_damage(model_folder, tmp_path):
    run(model_folder, tmp_path)
    with pytest.raises(InputError, match="steps = 20, not 30"):
        run(model_folder, tmp_path, steps=30, resume=True)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        run(model_folder, tmp_path, resume=True)


def test_a_checkpoint_is_not_called_damaged_for_want_of_memory(model_folder, tmp_path, monkeypatch):
    """Whoever believed that would delete it."""

    def hungry(*args, **options):
        torch.empty(10**14)

    run(model_folder, tmp_path)
    for owner, name in ((torch, "load"), (torch.optim.AdamW, "load_state_dict")):
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory, match="too little memory to resume"):
            patch.setattr(owner, name, hungry)
            run(model_folder, tmp_path, resume=True)


def test_a_damaged_checkpoint_is_refused_or_harmless(model_folder, tmp_path):
    """Each bit that is flipped is told, unless it is one of those that fill up the file between its parts."""

    def equal(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    run(model_folder, tmp_path, steps=2)
    path, refused = tmp_path / "checkpoint.pt", 0
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    for bit in random.sample(range(8 * len(content)), 150):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert equal(read_checkpoint(path, state["settings"]), state), f"bit {bit} was flipped"
        except InputError as error:
            assert "damaged" in str(error)
            refused += 1
    assert refused > 75


def test_a_loss_that_is_not_a_number_stops_the_run(model_folder, tmp_path):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    prefix = Prefix(model, 3, mlp_width=0)
    with pytest.raises(InputError, match="nan at step"):
        train(model, prefix, tokenizer, PAIRS, PAIRS, tmp_path, steps=20, batch_size=4, lr=1e38, eval_every=50)


@pytest.mark.parametrize("eval_every", [5, 50])
def test_the_batch_that_breaks_the_loss_is_named(eval_every, model_folder, tmp_path):
    """One pair reaches a position whose embedding is infinite: in the third epoch's batches, at a random place."""
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    pairs = [([5 + i, 6, 7 + i], [40 + i, 50, 60, 4095]) for i in range(80)]
    long = ([9] * 30, [8, 4095])
    steps = [step for step, batch in enumerate(islice(batch_stream([*pairs, long], 4, 101, 0), 21), 1)
             if long in pairs_of(batch)]  # fmt: skip
    model.wpe.weight[20:] = math.inf
    first = next(islice(batch_stream([*pairs, long], 4, 101, 0), steps[0] - 1, None))[0][0]
    with pytest.raises(InputError) as error:
        train(model, Prefix(model, 3, mlp_width=0), tokenizer, [*pairs, long], pairs[:4], tmp_path, steps=60,
              batch_size=4, lr=1e-3, eval_every=eval_every)  # fmt: skip
    text = tokenizer.decode(first).strip()[:80]
    assert f"the loss became nan at step {steps[0]}: lower" in str(error.value)
    assert f"its batch, which begins with {text!r}; then begin anew" in str(error.value)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == (steps[0] - 1) // eval_every * eval_every
    assert all(p.isfinite().all() for p in saved["tuned"].values())


@pytest.mark.parametrize("hidden, optimizer", [(0, Muon), (8, torch.optim.AdamW)])
def test_interrupted_and_resumed_by_either_optimiser(hidden, optimizer, model_folder, tmp_path, monkeypatch):
    def trained(out, **options):
        torch.manual_seed(1)
        model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
        prefix = Prefix(model, 3, hidden)
        assert type(make_optimizer(prefix, 1e-2)) is optimizer
        train(model, prefix, tokenizer, PAIRS, PAIRS, tmp_path / out, steps=20, batch_size=4, lr=1e-2, eval_every=5,
              **options)  # fmt: skip
        return prefix.state_dict()

    def step_or_stop(*args):
        if calls.append(args) or len(calls) == 13:
            raise KeyboardInterrupt
        return step(*args)

    whole, step, calls = trained("whole"), training.training_step, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "training_step", step_or_stop)
        trained("stopped")
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] == 12
    resumed = trained("stopped", resume=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_prefix_bit_for_bit(model_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    examples = [{"source": f"item {i} of a list", "target": f"it is number {i}."} for i in range(60)]
    rows.write_text("".join(json.dumps(example) + "\n" for example in examples))

    def command(out):
        options = ["--steps", "120", "--eval-every", "3", "--lr", "0.01", "--batch-size", "4", "--dtype", "float32"]
        return [sys.executable, ROOT / "train.py", "--model", model_folder, "--task", rows, "--out", tmp_path / out,
                "--eval-inputs", "0", "--device", "cpu", "--resume", *options]  # fmt: skip

    subprocess.run(command("whole"), check=True, capture_output=True)
    log, done = tmp_path / "killed" / "log.jsonl", 0
    for _ in range(3):
        killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment = done + random.randrange(1, 12)  # dev losses until the kill
        while done < moment:
            assert killed.poll() is None, "the run had ended before it was killed"
            time.sleep(0.002)
            done = len(log.read_text().splitlines()) if log.exists() else 0
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not (tmp_path / "killed" / "prefix.safetensors").exists(), "the run had ended before it was killed"
    subprocess.run(command("killed"), check=True, capture_output=True)
    whole, resumed = ((tmp_path / out / "prefix.safetensors").read_bytes() for out in ("whole", "killed"))
    assert whole == resumed


def test_a_run_is_not_resumed_with_another_start(tmp_path):
    model, tokenizer = load_model(write_tiny_bart(tmp_path / "bart")), load_tokenizer(tmp_path / "bart")
    pairs = encode_pairs([Example("a b", ["c"]), Example("d", ["e f"])], tokenizer, model)

    def run(pairs, **options):
        train(model, Prefix(model, 3, 8), tokenizer, pairs, pairs, tmp_path / "run", steps=2, batch_size=2, lr=1e-3,
              eval_every=1, **options)  # fmt: skip

    run(pairs, settings={"init": "words"})
    with pytest.raises(InputError, match="init = words, not None: resume with the same"):
        run(pairs, resume=True)
    with pytest.raises(InputError, match="another training data: resume with the same"):
        run(pairs[:1], settings={"init": "words"}, resume=True)
    run(pairs, settings={"init": "words"}, resume=True)


def test_a_step_is_split_by_pairs_not_by_groups():
    """No part of a step with --accumulate holds more pairs than a batch, however many targets its groups have."""
    pairs = [([1, source], [2, target]) for source in range(6) for target in range(7)]
    for batch_size, accumulate, group in ((4, 2, 8), (8, 3, 4), (1, 4, 8)):
        stream = training.batch_stream(pairs, batch_size * accumulate, 0, 0, False, group, accumulate)
        for groups in itertools.islice(stream, 3):
            parts = training.split_groups(groups, accumulate)
            assert sorted(g for part in parts for g in part) == sorted(groups)
            assert max(map(training.pair_count, parts)) <= batch_size
    assert training.split_groups([("a", [1]), ("b", [1]), ("c", [1])], 2) == [[("a", [1]), ("c", [1])], [("b", [1])]]
