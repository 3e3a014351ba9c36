"""Fine-tuning through the same train.py: what is trained, what is written, what sample.py makes of it."""

import json

import pytest
import torch

import sample
import train
from minprefix import load_model
from minprefix.formats.load import save_model
from minprefix.formats.safetensors import read_safetensors
from minprefix.methods.baselines import Finetune
from minprefix.system.errors import InputError
from tests.helpers import assert_one_clear_line, call
from tests.tiny import write_tiny_bart, write_tiny_model

pytestmark = pytest.mark.slow


def finetune(folder, capsys, *options, model="model", task="rows.jsonl"):
    return call(train, capsys, "--method", "finetune", "--model", folder / model, "--task", folder / task,
                "--eval-every", 2, "--eval-inputs", 2, "--device", "cpu", "--lr", "1e-2", *options)  # fmt: skip


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="float32"):
        Finetune(load_model(write_tiny_model(tmp_path / "model"), dtype=torch.bfloat16))


@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_bart])
def test_a_saved_model_loads_here_and_in_transformers(tmp_path, write):
    model = load_model(write(tmp_path / "first"))
    save_model(model, tmp_path / "saved", tmp_path / "first", info={"task": "e2e"})
    again = load_model(tmp_path / "saved")
    assert again.config["minprefix"] == {"task": "e2e"}
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    transformers = pytest.importorskip("transformers")
    peer_class = transformers.BartForConditionalGeneration if model.encoder_decoder else transformers.GPT2LMHeadModel
    peer, report = peer_class.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([[5, 6, 7]])
    logits = peer(ids, decoder_input_ids=ids).logits if model.encoder_decoder else peer(ids).logits
    assert torch.allclose(logits, model(*[ids] * (1 + model.encoder_decoder)), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_and_sample(world, tmp_path, capsys, dtype):
    code, out, err = finetune(world, capsys, "--steps", 30, "--dtype", dtype, "--out", tmp_path / "run")
    assert code == 0, err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["dev_loss"] < 0.7 * log[0]["dev_loss"]
    model, base = load_model(tmp_path / "run" / "model"), load_model(world / "model")
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and not torch.equal(p, base.state_dict()[name]), name
    line = out.splitlines()[-1]
    assert line.startswith(f"  python sample.py --model {tmp_path / 'run' / 'model'} --task")
    options = ["--model", tmp_path / "run" / "model", "--max-new-tokens", 9]
    code, out, _ = call(sample, capsys, *options, "--input", "item 3 of the list")
    assert code == 0 and len(out.splitlines()) == 1
    code, out, _ = call(sample, capsys, *options, "--task", world / "rows.jsonl", "--limit", 2, "--evaluate")
    assert code == 0 and (tmp_path / "run" / "texts-all.json").is_file()  # beside the run


def test_sample_knows_the_task_of_a_fine_tuned_model(world, tmp_path, capsys):
    code, _, err = call(train, capsys, "--method", "finetune", "--model", world / "model", "--data", world / "e2e",
                        "--steps", 1, "--eval-inputs", 0, "--max-source", 40, "--out", tmp_path / "run")  # fmt: skip
    assert code == 0, err
    options = ["--model", tmp_path / "run" / "model", "--max-new-tokens", 5]
    ours = call(sample, capsys, *options, "--input", "name[Zizzi], food[Thai]")
    assert ours[0] == 0 and ours == call(sample, capsys, *options, "--input", "name : Zizzi | food : Thai")
    assert call(sample, capsys, *options, "--input", "Zizzi")[0] == 2  # not E2E's form
    _, _, err = call(sample, capsys, *options, "--input", "name[" + "Zizzi " * 60 + "]")
    assert "first 40 tokens" in err


def test_resumed_it_gives_the_same_weights(world, tmp_path, capsys, monkeypatch):
    finetune(world, capsys, "--steps", 4, "--out", tmp_path / "whole")
    real, calls = train.train, []

    def stopped(*args, **options):  # as if killed after the second evaluation
        from minprefix.core import training

        save = training.save_checkpoint

        def save_and_stop(*a):
            save(*a)
            calls.append(a)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(training, "save_checkpoint", save_and_stop)
        return real(*args, **options)

    monkeypatch.setattr(train, "train", stopped)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        code, _, _ = finetune(world, capsys, "--steps", 4, "--out", tmp_path / "half")
        assert code == 0
    monkeypatch.undo()
    assert not (tmp_path / "half" / "model").exists()
    assert finetune(world, capsys, "--steps", 4, "--out", tmp_path / "half", "--resume")[0] == 0
    a, b = (load_model(tmp_path / run / "model").state_dict() for run in ("whole", "half"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options, message",
    [
        ("finetune --prefix-length 3", "--prefix-length has no effect with --method finetune: leave it out"),
        ("finetune --init words", "--init has no effect with"),
        ("top2 --hidden 0", "--hidden has no effect with --method top2"),
        ("embedding --offset 3", "--offset has no effect with --method embedding"),
        ("prefix --adapter-width 3", "--adapter-width has no effect with --method prefix"),
        ("adapter --adapter-width 0", "--adapter-width is 0: it must be above 0"),
        ("embedding --model bart --prefix-length 3 --hidden 0", "--method embedding needs GPT-2"),
        ("infix --model bart --prefix-length 3 --hidden 0", "--method infix needs GPT-2"),
    ],
)
def test_bad_input(world, capsys, monkeypatch, options, message):
    monkeypatch.chdir(world)
    if "bart" in options and not (world / "bart").exists():
        write_tiny_bart(world / "bart")
    line = f"--model model --task rows.jsonl --lr 1e-3 --steps 2 --batch-size 2 --method {options}"
    assert_one_clear_line(train, line, message, capsys, world)


@pytest.mark.parametrize("method", ["top2", "adapter", "embedding", "infix"])
def test_each_method_trains_and_samples(world, tmp_path, capsys, method):
    run = tmp_path / "run"
    code, out, err = call(train, capsys, "--method", method, "--model", world / "model", "--task", world / "rows.jsonl",
                          "--steps", 4, "--eval-every", 4, "--eval-inputs", 1, "--out", run, "--device", "cpu",
                          *(["--adapter-width", 2] if method == "adapter" else []))  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[-1].startswith(f"  python sample.py --prefix {run / method}.safetensors --task")
    tensors, info = read_safetensors(run / f"{method}.safetensors")
    assert info["method"] == method and info["task"] == "jsonl" and info["base_model"] == str(world / "model")
    result = json.loads((run / "result.json").read_text())
    saved = sum(tensor.numel() for tensor in tensors.values())
    total = sum(p.numel() for p in load_model(world / "model").parameters())
    assert (result["trained"] >= saved == result["saved"] and result["share"] == saved / total
            and len(result["scores"]) == 2)  # fmt: skip
    options = ["--input", "item 3 of the list", "--max-new-tokens", 9]
    texts = {call(sample, capsys, "--prefix", path, *options)[:2] for path in (run, run / f"{method}.safetensors")}
    assert len(texts) == 1 and texts.pop()[0] == 0
    code, _, err = call(sample, capsys, "--prefix", run, "--model", world / "twin", *options)
    assert code == 2 and "this model has the same shape, but other weights" in err


def test_a_fine_tuned_run_is_sampled_by_its_folder(world, tmp_path, capsys):
    assert finetune(world, capsys, "--steps", 4, "--out", tmp_path / "run")[0] == 0
    options = ["--input", "item 3 of the list", "--max-new-tokens", 9]
    ours = call(sample, capsys, "--prefix", tmp_path / "run", *options)
    assert ours[0] == 0 and ours == call(sample, capsys, "--model", tmp_path / "run" / "model", *options)
    code, _, err = call(sample, capsys, "--prefix", tmp_path / "run", "--model", world / "model", *options)
    assert code == 2 and "is a fine-tuned model, it needs no other: leave out --model" in err
