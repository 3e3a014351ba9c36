import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from minprefix import Prefix, load_model, load_tokenizer
from minprefix.data import collate
from minprefix.files import InputError
from minprefix.training import batch_stream, dev_loss, linear_schedule, target_loss, train
from tests.tiny import ROOT, write_tiny_model

PAIRS = [([5 + i, 6, 7 + i], [40 + i, 50, 60, 4095]) for i in range(12)] + [([9], [8, 4095])]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def run(folder, out, steps=20, **options):
    torch.manual_seed(1)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prefix = Prefix(model, 3, hidden=8)
    dev = PAIRS[:4]
    log = train(model, prefix, tokenizer, PAIRS, dev, out, steps=steps, batch_size=4, lr=1e-2, eval_every=5, **options)
    return model, prefix, log


def test_loss_is_that_of_the_target_tokens_alone(model_folder):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    prefix = Prefix(model, 3, hidden=0)()
    batch = collate(PAIRS, tokenizer.end_id, tokenizer.pad_id)
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
    prefix = Prefix(model, 3, hidden=8)
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


def test_schedule_is_linear():
    assert [linear_schedule(s, 4, 0) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [linear_schedule(s, 6, 2) for s in range(7)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])


def test_stream_can_start_anywhere():
    def first(start):
        stream = batch_stream(PAIRS, 4, seed=3, start=start)
        return [next(stream) for _ in range(12 - start)]

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


def test_a_loss_that_is_not_a_number_stops_the_run(model_folder, tmp_path):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    prefix = Prefix(model, 3, hidden=0)
    with pytest.raises(InputError, match="nan at step"):
        train(model, prefix, tokenizer, PAIRS, PAIRS, tmp_path, steps=20, batch_size=4, lr=1e38, eval_every=50)


def test_killed_and_resumed_gives_the_same_prefix_bit_for_bit(model_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    examples = [{"source": f"item {i} of a list", "target": f"it is number {i}."} for i in range(60)]
    rows.write_text("".join(json.dumps(example) + "\n" for example in examples))

    def command(out, *extra):
        options = ["--steps", "400", "--eval-every", "5", "--lr", "0.01", "--batch-size", "4", "--dtype", "float32"]
        return [sys.executable, ROOT / "train.py", "--model", model_folder, "--task", rows, "--out", tmp_path / out,
                "--eval-inputs", "0", "--device", "cpu", *options, *extra]  # fmt: skip

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, moment = tmp_path / "killed" / "log.jsonl", random.randrange(1, 30)  # dev losses until the kill
    while not log.exists() or len(log.read_text().splitlines()) < moment:
        assert killed.poll() is None
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "prefix.safetensors").exists(), "the run had ended before it was killed"
    subprocess.run(command("killed", "--resume"), check=True, capture_output=True)
    whole, resumed = ((tmp_path / out / "prefix.safetensors").read_bytes() for out in ("whole", "killed"))
    assert whole == resumed
