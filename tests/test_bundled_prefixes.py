"""The trained prefixes in weights/prefixes: they fit the bundled models, say how they were made, and work."""

import json

import pytest

import sample
from minprefix import load_model, load_prefix
from tests.test_scripts import call
from tests.tiny import ROOT

FOLDER = ROOT / "weights" / "prefixes"
FILES = sorted(FOLDER.glob("*.safetensors"))
INPUTS = {
    "gpt2-mini-e2e": "name[The Golden Lantern], eatType[pub], food[Thai], area[riverside], near[The Mill]",
    "bart-mini-scitldr": "We study how plants grow in the dark. We propose GreenNet, a neural network that predicts "
    "the growth of plants. On four benchmarks GreenNet outperforms previous methods by a large margin.",
}


def test_both_are_there():
    assert {path.stem for path in FILES} == set(INPUTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_model_is_bundled_and_its_making_told(path):
    prefix = load_prefix(path)
    load_prefix(path, load_model(prefix.info["base_model"]))  # raises where it does not fit
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert told.keys() == {"command", "settings", "log", "scores"}
    assert told["settings"]["seed"] and told["settings"]["task"] == prefix.info["task"]
    assert told["log"]["step"] == told["settings"]["steps"] and told["log"]["dev_loss"] > 0
    assert len(told["scores"]) >= 3 and "/" not in json.dumps(told["settings"])  # no machine's paths


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_says_what_the_input_says(path, capsys):
    code, out, err = call(sample, capsys, "--prefix", path, "--input", INPUTS[path.stem], "--dtype", "float32",
                          "--device", "cpu")  # fmt: skip
    assert code == 0, err
    # Not Thai: this model leaves out a kind of food that E2E's training set does not have.
    words = {"gpt2-mini-e2e": ["The Golden Lantern", "riverside", "The Mill"], "bart-mini-scitldr": ["plants"]}
    assert all(word in out for word in words[path.stem]), out
