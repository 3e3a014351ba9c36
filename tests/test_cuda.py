"""On a GPU, in float32, both models compute what they compute on the CPU; training, texts and the scripts work there.

python -m pytest tests/test_cuda.py                             skipped without a GPU
MINPREFIX_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py   the tests themselves, tried on a CPU
"""

import functools
import json
import os

import pytest
import torch

import sample
import train as train_script
from minprefix import Prefix, generate, load_model, load_prefix, load_tokenizer, stack_prefixes
from minprefix.core import kernels, training
from minprefix.core.batches import collate
from minprefix.core.cuda_graphs import TrainingGraphs
from minprefix.core.encode import encode_pairs
from minprefix.core.kernels import compiled_layers, packed_weights
from minprefix.core.loss import add_gradients
from minprefix.core.training import dev_loss, train
from minprefix.data.tasks import Example
from minprefix.methods.baselines import make_method
from tests.helpers import ROWS, call, singles
from tests.tiny import write_tiny_bart, write_tiny_model

DEVICE = os.environ.get("MINPREFIX_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")
WORDS = "The Golden Lantern is a Thai pub by the riverside near The Mill".split()
SOURCES = [" ".join(WORDS[: 2 + 3 * (i % 4)]) for i in range(9)]
EXAMPLES = [Example(source, [f"{source}, number {i}.", f"It is {source}."]) for i, source in enumerate(SOURCES)]
BOTH = pytest.mark.parametrize("kind", ["gpt2", "bart"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"gpt2": write_tiny_model(folder / "gpt2"), "bart": write_tiny_bart(folder / "bart")}


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch):
    """Compiling the loss on the CPU, to compare with, would take most of the time."""
    monkeypatch.setattr(kernels, "MIN_ELEMENTS_TO_COMPILE", 2**60)


def make_prefixes(model):
    """One for all rows, and a stack of two of unequal lengths, each on the CPU."""
    torch.manual_seed(1)
    one, other = (Prefix(model, length, mlp_width=0).fold() for length in (5, 3))
    rows = [i % 2 for i in range(len(SOURCES))]
    return {"none": None, "shared": one, "a row each": stack_prefixes([one, other], rows)}


def make_batch(model, tokenizer, several=True, pad_to=1):
    """Rows of one or two targets."""
    pairs = encode_pairs(EXAMPLES, tokenizer, model)
    groups = singles(pairs[:9])
    if several:
        groups = [(pairs[i][0], [pairs[i][1], pairs[i + 1][1]]) for i in range(0, 18, 2)]
    return collate(groups, tokenizer, model, pad_to)


@BOTH
@pytest.mark.parametrize("several", [False, True])
def test_logits(folders, kind, several):
    cpu, gpu = (load_model(folders[kind], device) for device in ("cpu", DEVICE))
    batch = make_batch(cpu, load_tokenizer(folders[kind]), several)
    for prefix in make_prefixes(cpu).values():
        expected = cpu(*batch.inputs, prefix=prefix, segments=batch.segments)
        logits = gpu(*batch.to(DEVICE).inputs, prefix=prefix, segments=batch.to(DEVICE).segments)
        assert logits.device.type == DEVICE
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(folders, kind, dtype):
    """In float32 as on the CPU; in bfloat16 they point the same way. As a CUDA graph, and not."""
    tokenizer, gradients = load_tokenizer(folders[kind]), []
    for device, captured in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        model = load_model(folders[kind], device, torch.float32 if device == "cpu" else dtype)
        torch.manual_seed(1)
        prefix = Prefix(model, 5, mlp_width=8).to(device)
        batch, graphs = make_batch(model, tokenizer, pad_to=8).to(device), TrainingGraphs(model, prefix)
        add = graphs.add_gradients if captured else functools.partial(add_gradients, model, prefix)
        with packed_weights(model, training=True):
            add(batch, 0.1)
            if captured:  # the second time it is only replayed
                prefix.zero_grad(set_to_none=True)
                add(batch, 0.1)
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in prefix.parameters()]))
    check_close(gradients, dtype)


def check_close(gradients, dtype):
    for gradient in gradients[1:]:
        assert torch.cosine_similarity(gradient, gradients[0], dim=0) > (0.99 if dtype == torch.bfloat16 else 1 - 1e-6)
        if dtype == torch.float32:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())


def run(folder, device, out, hidden=8, resume=False):
    torch.manual_seed(1)
    model, tokenizer = load_model(folder, device), load_tokenizer(folder)
    prefix = Prefix(model, 5, mlp_width=hidden).to(device)
    pairs = encode_pairs(EXAMPLES, tokenizer, model)
    log, _ = train(model, prefix, tokenizer, pairs, pairs[:6], out, steps=8, batch_size=4, lr=1e-2, eval_every=4,
                   group=2, resume=resume)  # fmt: skip
    return prefix.fold(), [row["dev_loss"] for row in log]


@BOTH
@pytest.mark.parametrize("hidden", [8, 0])
def test_training_is_that_on_the_cpu_and_is_resumed(folders, kind, hidden, tmp_path, monkeypatch):
    _, expected = run(folders[kind], "cpu", tmp_path / "cpu", hidden)
    whole, losses = run(folders[kind], DEVICE, tmp_path / "whole", hidden)
    assert losses == pytest.approx(expected, rel=1e-3) and losses[-1] < losses[0]
    step, done = training.training_step, []

    def stop_at_the_sixth(*args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(step(*args))
        return done[-1]

    monkeypatch.setattr(training, "training_step", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        run(folders[kind], DEVICE, tmp_path / "parts", hidden)
    monkeypatch.undo()
    resumed, losses_resumed = run(folders[kind], DEVICE, tmp_path / "parts", hidden, resume=True)
    assert losses_resumed == pytest.approx(losses, rel=1e-4)
    for site, kv in whole.kv.items():
        torch.testing.assert_close(resumed.kv[site], kv, rtol=1e-3, atol=1e-3)


@BOTH
@pytest.mark.parametrize("beams", [1, 4])
def test_texts(folders, kind, beams):
    """With one prefix, and with one for each row; on a GPU finished texts leave their batch later."""
    cpu, gpu = (load_model(folders[kind], device) for device in ("cpu", DEVICE))
    tokenizer, options = load_tokenizer(folders[kind]), {"beams": beams, "max_new_tokens": 20, "batch_size": 4}
    for name, prefix in make_prefixes(cpu).items():
        expected = generate(cpu, tokenizer, SOURCES, prefix, **options)
        assert generate(gpu, tokenizer, SOURCES, prefix, **options) == expected, name


def test_draws_come_from_the_devices_generator(folders):
    model, tokenizer = load_model(folders["gpt2"], DEVICE), load_tokenizer(folders["gpt2"])
    texts = []
    for seed in (1, 1, 2):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        options = {"sample": True, "top_p": 0.9, "top_k": 50, "generator": generator, "max_new_tokens": 12}
        texts.append(generate(model, tokenizer, SOURCES, beams=1, **options))
    assert texts[0] == texts[1] != texts[2]


@BOTH
@pytest.mark.parametrize("method", ["finetune", "adapter"])
def test_other_methods_lower_the_loss(folders, kind, method, tmp_path):
    """Fine-tuning multiplies in bfloat16 by autocast, its weights are float32."""
    model, tokenizer = load_model(folders[kind], DEVICE), load_tokenizer(folders[kind])
    trainable = make_method(method, model, adapter_width=8).to(DEVICE)
    pairs = encode_pairs(EXAMPLES, tokenizer, model)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=method == "finetune", cache_enabled=False):
        log, _ = train(model, trainable, tokenizer, pairs, pairs, tmp_path, steps=20, batch_size=6, lr=1e-2,
                       eval_every=10, group=2)  # fmt: skip
        loss = dev_loss(model, trainable, pairs, tokenizer, 6)
    assert log[-1]["dev_loss"] < log[0]["dev_loss"] - 0.03
    assert loss == pytest.approx(min(row["dev_loss"] for row in log), rel=1e-2)


@BOTH
def test_train_and_sample_from_the_shell(folders, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = ["--model", folders[kind], "--task", "rows.jsonl", "--device", DEVICE]
    options = ["--steps", 6, "--eval-every", 3, "--batch-size", 4, "--prefix-length", 4, "--hidden", 8]
    code, out, err = call(train_script, capsys, *common, *options, "--eval-inputs", 2, "--beams", 2, "--out", "run")
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"] == DEVICE and load_prefix("run").kv["decoder"].isfinite().all()
    where = ["--prefix", "run/prefix.safetensors", "--device", DEVICE, "--beams", 2]
    code, out, err = call(sample, capsys, *where, "--input", "item 3 of the list")
    assert code == 0 and out.strip(), err
    code, out, err = call(train_script, capsys, *common, "--method", "finetune", "--steps", 3, "--eval-every", 3,
                          "--batch-size", 4, "--eval-inputs", 0, "--out", "tuned")  # fmt: skip
    assert code == 0, err
    code, out, err = call(sample, capsys, "--prefix", "tuned", "--device", DEVICE, "--input", "item 3 of the list")
    assert code == 0, err


def test_gradients_of_compiled_layers(folders, capsys):
    """As with `train --compile`. The last test, and one case, since compiling takes a minute."""
    tokenizer, gradients = load_tokenizer(folders["gpt2"]), []
    for device in ("cpu", DEVICE):
        model = load_model(folders["gpt2"], device)
        torch.manual_seed(1)
        prefix = Prefix(model, 5, mlp_width=8).to(device)
        batch = make_batch(model, tokenizer, pad_to=8).to(device)
        with compiled_layers(model):
            TrainingGraphs(model, prefix).add_gradients(batch, 0.1)
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in prefix.parameters()]))
    check_close(gradients, torch.float32)
    assert "torch.compile does not work" not in capsys.readouterr().err
