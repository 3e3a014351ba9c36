"""The trained prefixes in weights/prefixes: they fit the bundled models, say how they were made, and work."""

import json

import pytest
import torch

import sample
from minprefix import generate, load_model, load_prefix, load_tokenizer
from minprefix.core.encode import Example, encode_pairs
from minprefix.core.training import dev_loss
from minprefix.data.sample_e2e import sample_rows
from minprefix.data.tasks import format_source
from tests.helpers import call
from tests.tiny import ROOT

pytestmark = pytest.mark.slow

FOLDER = ROOT / "weights" / "prefixes"
FILES = sorted(FOLDER.glob("*.safetensors"))
INPUTS = {
    "gpt2-mini-e2e": "name[The Golden Lantern], eatType[pub], food[Thai], area[riverside], near[The Mill]",
    "bart-mini-scitldr": "We study how plants grow in the dark. We propose GreenNet, a neural network that predicts "
    "the growth of plants. On four benchmarks GreenNet outperforms previous methods by a large margin.",
}


# Chosen before any prefix was trained; none of the names is in E2E's training set. See weights/RESULTS.md.
NEW_NAMES = [
    "name[The Golden Lantern], eatType[pub], food[Thai], area[riverside], near[The Mill]",
    "name[Green Dragon], eatType[restaurant], food[Chinese], priceRange[cheap], area[city centre]",
    "name[Harbour Kitchen], eatType[restaurant], food[Italian], customer rating[5 out of 5], familyFriendly[yes]",
    "name[Old Forge], eatType[pub], food[English], area[riverside], familyFriendly[no]",
    "name[Luna], eatType[coffee shop], priceRange[moderate], customer rating[3 out of 5], near[Burger King]",
    "name[Saffron House], eatType[restaurant], food[Indian], priceRange[high], area[city centre], near[Station Road]",
    "name[The Blue Door], eatType[coffee shop], food[Japanese], area[riverside]",
    "name[Marco's], eatType[restaurant], food[French], customer rating[high], area[riverside], familyFriendly[yes]",
    "name[Red Lion], eatType[pub], food[Fast food], priceRange[less than £20], customer rating[low], "
    "familyFriendly[yes]",
    "name[Silver Spoon], eatType[restaurant], food[Chinese], priceRange[£20-25], area[city centre], near[Café Royal]",
    "name[The White Hart], eatType[pub], food[French], priceRange[more than £30], customer rating[1 out "
    "of 5], area[riverside], familyFriendly[no], near[Park Street]",
]


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
    # Not Thai, which it misspells.
    words = {"gpt2-mini-e2e": ["The Golden Lantern", "pub", "riverside", "The Mill"], "bart-mini-scitldr": ["plants"]}
    assert all(word in out for word in words[path.stem]), out


def test_it_copies_most_names_that_training_did_not_have():
    """8 of 11 (one with a letter added); a prefix that was trained without weight decay copied 1."""
    names = [text[5 : text.index("]")] for text in NEW_NAMES]
    model, tokenizer = load_model("gpt2-mini"), load_tokenizer("gpt2-mini")
    prefix = load_prefix(FOLDER / "gpt2-mini-e2e.safetensors", model)
    texts = generate(model, tokenizer, [format_source("e2e", text) for text in NEW_NAMES], prefix=prefix)
    assert sum(name in text for name, text in zip(names, texts, strict=True)) >= 8, texts


def test_bfloat16_gives_the_loss_of_float32():
    """Within 0.5%: so much may --dtype auto change where the hardware multiplies bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, losses = load_tokenizer("gpt2-mini"), {}
    examples = [Example(format_source("e2e", mr), [reference]) for mr, reference in sample_rows("dev")[:96]]
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model("gpt2-mini", device, dtype)
        prefix = load_prefix(FOLDER / "gpt2-mini-e2e.safetensors", model)
        pairs = encode_pairs(examples, tokenizer, model)
        losses[dtype] = dev_loss(model, lambda prefix=prefix: prefix, pairs, tokenizer, batch_size=16)
    assert losses[torch.bfloat16] != losses[torch.float32]  # that both were measured
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.005)
