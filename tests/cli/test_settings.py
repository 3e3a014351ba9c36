"""The default settings: the paper's numbers, the bundled models', and that train.py and the studies both take them."""

import sys
from argparse import Namespace

import pytest

import train
from minprefix.cli.settings import BUNDLED, LR, OPTIONS, default_settings, learning_rate, settings_table
from minprefix.formats.hub import resolve_model
from minprefix.formats.load import empty_model
from minprefix.methods.baselines import Adapters
from minprefix.studies.studies import tuning
from tests.helpers import assert_one_clear_line
from tests.tiny import write_tiny_bart, write_tiny_model


@pytest.mark.parametrize(
    "kind, task, lr, epochs, batch_size, length, hidden",
    [
        ("gpt2", "e2e", 8e-5, 5, 10, 5, 512),
        ("gpt2", "webnlg", 5e-5, 5, 5, 5, 512),
        ("gpt2", "dart", 5e-5, 10, 5, 10, 512),
        ("bart", "xsum", 5e-5, 30, 16, 200, 800),
        ("bart", "webnlg", 5e-5, 30, 16, 200, 800),  # the paper's settings for WebNLG are GPT-2's
    ],
)
def test_the_papers_settings(kind, task, lr, epochs, batch_size, length, hidden):
    settings = default_settings("gpt2-medium" if kind == "gpt2" else None, kind, task)
    assert settings == {"lr": lr, "epochs": epochs, "batch_size": batch_size, "prefix_length": length, "hidden": hidden,
                        "group": 1, "eval_every": 100 if kind == "gpt2" else 1000}  # fmt: skip


@pytest.mark.parametrize("task", ["e2e", "dart"])
def test_the_bundled_models_settings_are_their_own_whatever_the_task(task):
    assert default_settings("gpt2-mini", "gpt2", task) == {
        "lr": 0.03, "steps": 1500, "batch_size": 16, "prefix_length": 100, "hidden": 0, "group": 1, "eval_every": 100,
    }  # fmt: skip
    assert default_settings("bart-mini", "bart", task) == {
        "lr": 3e-3, "steps": 750, "batch_size": 16, "prefix_length": 20, "hidden": 512, "group": 1, "eval_every": 100,
    }  # fmt: skip
    rates = {method: learning_rate("gpt2-mini", "gpt2", task, method) for method in OPTIONS}
    assert rates == {"prefix": 0.03, "finetune": 1e-3, "top2": 3e-3, "adapter": 1e-2, "embedding": 3.0, "infix": 0.09}
    assert default_settings("gpt2-mini", "gpt2", task, "adapter") == {
        "lr": 1e-2, "steps": 1500, "batch_size": 16, "adapter_width": 28, "group": 1, "eval_every": 100,
    }  # fmt: skip


def test_no_rate_for_what_a_model_cannot_be_trained_with():
    assert learning_rate("bart-mini", "bart", "e2e", "infix") is learning_rate(None, "bart", "e2e", "embedding") is None
    assert default_settings(None, "t5", "e2e")["lr"] is None  # load_model refuses it


@pytest.mark.parametrize("name", BUNDLED)
def test_each_bundled_model_has_rates_for_each_method_that_it_takes(name):
    assert LR[name].keys() == LR[name.removesuffix("-mini")].keys()


@pytest.mark.parametrize("task, method, options", [
    ("e2e", "prefix", {"lr": 8e-5, "epochs": 5, "batch_size": 10, "prefix_length": 5, "hidden": 512, "beams": 5}),
    ("dart", "infix", {"lr": 5e-5, "epochs": 10, "batch_size": 5, "prefix_length": 10, "hidden": 512, "beams": 5}),
    ("e2e", "adapter", {"lr": 5e-5, "epochs": 5, "adapter_width": 108, "hidden": None, "prefix_length": None}),
    ("scitldr", "finetune", {"lr": 5e-5, "epochs": 30, "batch_size": 16, "eval_every": 1000, "beams": 6}),
])  # fmt: skip
def test_train_takes_them(task, method, options, tmp_path, monkeypatch):
    folder = (write_tiny_bart if task == "scitldr" else write_tiny_model)(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    command = ["train.py", "--model", str(folder), "--task", task, "--data", ".", "--method", method]
    monkeypatch.setattr(sys, "argv", command)
    args = vars(train.parse_args())
    assert {key: args[key] for key in options} == options
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "7", "--lr", "0.5", "--batch-size", "3"])
    args = train.parse_args()
    assert (args.epochs, args.steps, args.lr, args.batch_size) == (None, 7, 0.5, 3)


def test_a_group_that_no_batch_could_be_made_of_is_told(tmp_path, capsys, monkeypatch):
    folder = write_tiny_model(tmp_path / "model")
    message = "--group 4 has no effect: no number from 2 to 4 divides the batch size, 7"
    assert_one_clear_line(train, f"--model {folder} --group 4 --batch-size 7", message, capsys, tmp_path)
    assert_one_clear_line(train, f"--model {folder} --group 0", "--group is 0: it must be above 0", capsys, tmp_path)


@pytest.mark.parametrize(
    "data, method, rates",
    [
        ("full", "top2", ["0.001", "0.003", "0.009"]),
        ("full", "adapter 3%", ["0.0033", "0.01", "0.03"]),
        ("full", "adapter 0.1%", ["0.01", "0.03", "0.09"]),
        ("low-data", "prefix", ["0.01", "0.03", "0.09"]),
        ("topics", "prefix", ["0.01", "0.03", "0.09"]),
    ],
)
def test_a_study_tries_rates_around_the_default(data, method, rates):
    args = study_args("gpt2-mini", "gpt2")
    assert [run.factors["lr"] for run in tuning(args, data, method)] == rates


def test_a_study_of_another_model_tries_rates_around_the_papers():
    args = study_args("path/to/model", "bart")
    assert [run.factors["lr"] for run in tuning(args, "full", "prefix")] == ["1.7e-05", "5e-05", "0.00015"]


def study_args(model, kind):
    return Namespace(model=model, kind=kind, task="e2e", data="e2e", study="full", steps=100, batch_size=16,
                     limit_test=None, widths={"adapter 3%": 28, "adapter 0.1%": 1}, lr={})  # fmt: skip


@pytest.mark.parametrize("options", ["", "--hidden 0", "--method infix --hidden 9"])
def test_another_kind_of_model_is_told_whatever_the_options(options, tmp_path, capsys, monkeypatch):
    folder = write_tiny_model(tmp_path / "llama")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    assert_one_clear_line(train, f"--model llama {options}", "'llama', minprefix runs gpt2 and bart", capsys, tmp_path)


def test_of_whose_weights_adapters_are_three_percent(monkeypatch, capsys):
    for name in BUNDLED:
        model = empty_model(resolve_model(name))
        total = sum(p.numel() for p in model.parameters())
        added = sum(p.numel() for p in Adapters(model, BUNDLED[name]["adapter_width"]).parameters())
        assert round(100 * added / total) == 3, name
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert "(by model; 3% of GPT-2 medium)" in capsys.readouterr().out  # but 2.4% of distilgpt2


def test_embedding_and_infix_have_the_length_of_their_rates():
    for method, length in (("prefix", 100), ("embedding", 10), ("infix", 10)):
        assert default_settings("gpt2-mini", "gpt2", "e2e", method)["prefix_length"] == length


def test_the_table_of_help_has_every_default():
    lines = {line.split("  ")[1]: line.split()[-4:] for line in settings_table().splitlines() if line[:3] == "  -"}
    assert lines["--prefix-length"] == ["100", "20", "5", "200"] and lines["--hidden"] == ["0", "512", "512", "800"]
    assert lines["--lr of prefix"] == ["0.03", "0.003", "8e-5", "5e-5"]
    assert lines["--lr of infix"] == ["0.09", "-", "8e-5", "-"] and lines["--steps"] == ["1500", "750", "-", "-"]
    assert len(lines) == 14
    assert "other GPT-2 on dart: --lr 5e-5 --batch-size 5 --epochs 10 --prefix-length 10" in settings_table()


@pytest.mark.parametrize("model, options, lr", [
    ("model", "--hidden 0", 0.03), ("model", "--hidden 99", 8e-5), ("model", "--hidden 0 --lr 0.2", 0.2),
    ("gpt2-mini", "--hidden 64", 3e-3), ("gpt2-mini", "--hidden 64 --method infix", 3e-3),
    ("gpt2-mini", "--hidden 0", 0.03), ("gpt2-mini", "--prefix-length 20", 0.09),
    ("gpt2-mini", "--prefix-length 50", 0.03),
    ("gpt2-mini", "--prefix-length 10 --hidden 64", 3e-3), ("gpt2-mini", "--hidden 64 --method embedding", 3.0),
])  # fmt: skip
def test_a_rate_suits_the_form_of_the_prefix(model, options, lr, tmp_path, monkeypatch):
    if model == "model":
        model = str(write_tiny_model(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", model, *options.split()])
    assert train.parse_args().lr == lr
