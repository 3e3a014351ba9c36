"""Each method of baselines.py as a library: what it computes, trains, leaves alone, saves and loads."""

import json

import numpy as np
import pytest
import torch

from minprefix import Prefix, load_model, load_prefix, load_tokenizer
from minprefix.core import training
from minprefix.core.batches import collate
from minprefix.core.encode import end_ids
from minprefix.core.generate import generate_ids
from minprefix.core.gpt2 import GPT2
from minprefix.core.loss import target_loss
from minprefix.core.prefix import count_parameters, fingerprint
from minprefix.core.prefix_kv import tensors_of
from minprefix.formats.load import save_model
from minprefix.formats.prefix_file import save_prefix
from minprefix.formats.safetensors import write_safetensors
from minprefix.methods.baselines import Adapters, EmbeddingOnly, Finetune, Infix, top_layers
from minprefix.methods.files import find_trained, load_trained, save_trained
from minprefix.system.errors import InputError
from tests.helpers import numpy_inputs, numpy_logits, pairs_of, reference_infix, singles
from tests.tiny import write_tiny_bart, write_tiny_model

pytestmark = pytest.mark.slow

P, START, END = 3, 4095, 4095
PAIRS = [([5 + i, 6, 7 + i, 8][: 2 + i % 3], [*[40 + i, 50, 60][i % 2 :], END]) for i in range(12)]
BART_PAIRS = [([0, *source, 2], [0, *target[:-1], 2]) for source, target in PAIRS]
METHODS = {
    "prefix": lambda model: Prefix(model, P, mlp_width=0),
    "finetune": Finetune,
    "top2": lambda model: Finetune(model, top_layers(model)),
    "adapter": lambda model: Adapters(model, 4),
    "embedding": lambda model: EmbeddingOnly(model, P, mlp_width=0),
    "embedding through an MLP": lambda model: EmbeddingOnly(model, P, mlp_width=8),
    "infix": lambda model: Infix(model, P, mlp_width=8),
}
OF_BART = ("finetune", "top2", "adapter")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_tiny_bart(folder / "bart", decoder_start_token_id=3)
    write_tiny_model(folder / "twin", seed=1)
    return {"gpt2": write_tiny_model(folder / "gpt2"), "bart": folder / "bart", "twin": folder / "twin"}


CASES = [*(("gpt2", method) for method in METHODS), *(("bart", method) for method in OF_BART)]


@pytest.fixture(params=CASES, ids=" ".join)
def case(request, folders):
    """A model's folder, and a method."""
    kind, method = request.param
    return folders[kind], method


def make(folder, method, seed=1):
    torch.manual_seed(seed)
    model = load_model(folder)
    return model, METHODS[method](model)


def optimise(folder, model, trainable, out, steps=20, lr=1e-2, **options):
    pairs = BART_PAIRS if model.encoder_decoder else PAIRS
    return training.train(model, trainable, load_tokenizer(folder), pairs, pairs[:4], out, steps=steps, batch_size=4,
                          lr=lr, eval_every=5, **options)  # fmt: skip


@torch.no_grad()
def target_logits(folder, model, prefix):
    """Of a batch of ragged rows, where the loss looks."""
    batch = collate(singles((BART_PAIRS if model.encoder_decoder else PAIRS)[:4]), load_tokenizer(folder), model)
    prefix = prefix.with_source_lengths(batch.source_lengths) if hasattr(prefix, "with_source_lengths") else prefix
    return model.logits(model.hidden_states(*batch.inputs, prefix=prefix).flatten(0, 1)[batch.target_positions])


# ---- shares ----


@pytest.mark.parametrize(
    "method, options, saved, share",
    [
        (Prefix, (5,), 24 * 2 * 1024 * 5, "0.07%"),
        (Prefix, (10,), 24 * 2 * 1024 * 10, "0.14%"),
        (Infix, (10,), 24 * 2 * 1024 * 10, "0.14%"),
        (EmbeddingOnly, (10,), 10 * 1024, "0.00%"),
        (Adapters, (108,), 48 * (2 * 1024 * 108 + 108 + 1024), "3.01%"),
        (Adapters, (3,), 48 * (2 * 1024 * 3 + 3 + 1024), "0.10%"),
        (Finetune, (), 354_823_168, "100.00%"),
        ("top2", (), 2 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 + 50257 * 1024, "21.60%"),
    ],
)
def test_shares_of_gpt2_medium(method, options, saved, share):
    with torch.device("meta"):
        model = GPT2({"vocab_size": 50257, "n_positions": 1024, "n_embd": 1024, "n_layer": 24, "n_head": 16})
        trainable = Finetune(model, top_layers(model)) if method == "top2" else method(model, *options)
    trained, numbers, total = count_parameters(trainable, model)
    assert (numbers, f"{numbers / total:.2%}", total) == (saved, share, 354_823_168)
    through_mlp = {Prefix: 24 * 2 * 1024, Infix: 24 * 2 * 1024, EmbeddingOnly: 1024}  # what comes out of it for a token
    if out := through_mlp.get(method):
        assert trained == options[0] * 1024 + (1024 + 1) * 512 + (512 + 1) * out
    else:
        assert trained == saved


# ---- training ----


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
@pytest.mark.parametrize("method, dtype", [*((m, torch.float32) for m in OF_BART), ("adapter", torch.bfloat16)])
def test_untrained_it_is_the_model_itself(folders, kind, method, dtype):
    model, before = (load_model(folders[kind], dtype=dtype) for _ in range(2))
    trainable = METHODS[method](model)
    logits = [target_logits(folders[kind], m, prefix) for m, prefix in ((model, trainable()), (before, None))]
    assert torch.equal(*logits)


def test_training_and_a_file_and_back(case, tmp_path):
    """The loss falls, what is not trained stays bit for bit, what is saved gives the same logits on a fresh model."""
    folder, method = case
    model, trainable = make(folder, method)
    base = fingerprint(model)
    log, _ = optimise(folder, model, trainable, tmp_path, lr=0.3 if trainable() else 1e-2)
    least = 0.01 if "embedding" in method else 0.05  # what random layers tell of an embedding changes little
    assert min(row["dev_loss"] for row in log) < log[0]["dev_loss"] - least
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == (set(trainable.fold()) if isinstance(trainable, Finetune) else set())
    for name, p in load_model(folder).named_parameters():
        assert torch.equal(p, model.get_parameter(name)) == (name not in trained), name

    logits = target_logits(folder, model, trainable())
    if method == "finetune":
        save_model(model, tmp_path / "model", folder, info={"task": "e2e"})
        assert find_trained(tmp_path) == find_trained(tmp_path / "model") == tmp_path / "model"
        fresh, prefix = load_model(find_trained(tmp_path)), None
    else:
        info = {"method": method.split()[0], "base_model": "tiny"}
        path = tmp_path / f"{info['method']}.safetensors"
        if isinstance(trainable, Prefix):
            save_prefix(path, trainable.fold(), model, info)
        else:
            save_trained(path, trainable.fold(), base, info)
        assert find_trained(tmp_path) == path
        fresh = load_model(folder)
        prefix = load_trained(path, fresh)
    assert torch.equal(target_logits(folder, fresh, prefix), logits)
    assert not torch.equal(target_logits(folder, load_model(folder), None), logits)


@pytest.mark.parametrize("method", ["top2", "adapter"])
def test_what_was_trained_ends_texts_as_in_training(folders, tmp_path, method):
    """Not where the base model's config.json says: the targets end with the tokeniser's end token."""
    model, trainable = make(folders["gpt2"], method)
    path = tmp_path / "trained.safetensors"
    save_trained(path, trainable.fold(), fingerprint(model), {"method": method})
    fresh, tokenizer = load_model(folders["gpt2"]), load_tokenizer(folders["gpt2"])
    fresh.config["eos_token_id"] = [5, 6]
    assert end_ids(fresh, tokenizer) == [5, 6]
    load_trained(path, fresh)
    assert end_ids(fresh, tokenizer) == [END]


def test_a_killed_run_goes_on_bit_for_bit(case, tmp_path, monkeypatch):
    folder, method = case
    model, whole = make(folder, method)
    optimise(folder, model, whole, tmp_path / "whole")
    save, calls = training.save_checkpoint, []

    def save_and_stop(*arguments):
        save(*arguments)
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        optimise(folder, *make(folder, method), tmp_path / "half")
    monkeypatch.undo()
    model, resumed = make(folder, method, seed=2)  # what it begins with comes from the checkpoint
    optimise(folder, model, resumed, tmp_path / "half", resume=True)
    whole, resumed = tensors_of(whole.fold()), tensors_of(resumed.fold())
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_is_not_resumed_by_another_method(folders, tmp_path):
    optimise(folders["gpt2"], *make(folders["gpt2"], "infix"), tmp_path, steps=1)
    torch.manual_seed(1)
    model = load_model(folders["gpt2"])
    with pytest.raises(InputError, match="is of a run with trained = Infix, not Prefix"):
        optimise(folders["gpt2"], model, Prefix(model, P, 8), tmp_path, steps=1, resume=True)


# ---- what embedding-only and infix compute ----


def reference_embedding(model, ids, embedding):
    """Logits of [EMB; ids] at ids -> (T, V)."""
    virtual = embedding.double().numpy() + model.wpe.weight[:P].double().numpy()
    x = np.concatenate([virtual, numpy_inputs(model, ids, range(P, P + len(ids)))])
    return numpy_logits(model, x)[P:]


@pytest.fixture(scope="module")
def gpt2(folders):
    return load_model(folders["gpt2"], dtype=torch.float64)


def test_embedding_only_is_the_model_over_the_embeddings_and_the_text(gpt2):
    torch.manual_seed(3)
    ids = torch.randint(4096, (3, 9))
    trainable = EmbeddingOnly(gpt2, P, mlp_width=0).double()
    logits = gpt2(ids, trainable())
    for row, expected in zip(logits.detach(), ids.tolist(), strict=True):
        assert np.abs(row.numpy() - reference_embedding(gpt2, expected, trainable.embedding.detach())).max() < 1e-10


def test_the_target_sees_the_infix_and_the_source_does_not(gpt2):
    torch.manual_seed(3)
    trainable = Infix(gpt2, P, mlp_width=0).double()
    rows = [([5, 6, 7, 8], [START, 40, 50]), ([9], [START, 41, 51, 61, 71, 81]), ([10, 11], [START])]
    width = max(len(source) + len(target) for source, target in rows)
    ids = torch.tensor([[*source, *target, *[1] * (width - len(source + target))] for source, target in rows])
    infix = trainable().with_source_lengths(torch.tensor([len(source) for source, _ in rows]))
    logits, alone = gpt2(ids, infix).detach(), gpt2(ids)
    for b, (source, target) in enumerate(rows):
        expected = reference_infix(gpt2, source, target, infix["decoder"].detach())
        assert np.abs(logits[b, : len(expected)].numpy() - expected).max() < 1e-10
        assert torch.allclose(logits[b, : len(source)], alone[b, : len(source)], rtol=0, atol=1e-12)
        assert (logits[b, len(source)] - alone[b, len(source)]).abs().max() > 0.01
    with pytest.raises(InputError, match=r"infix.with_source_lengths\(lengths\)"):
        gpt2(ids, trainable())


@pytest.mark.parametrize("method", ["embedding", "infix"])
def test_greedy_texts_are_those_of_the_reference(gpt2, method):
    torch.manual_seed(3)
    trainable = (EmbeddingOnly if method == "embedding" else Infix)(gpt2, P, mlp_width=0).double()
    sources = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    with torch.no_grad():
        texts = generate_ids(gpt2, sources, START, END, trainable(), beams=1, max_new_tokens=4, batch_size=2)
    for source, text in zip(sources, texts, strict=True):
        target = [START]
        for _ in range(4):
            if method == "infix":
                logits = reference_infix(gpt2, source, target, trainable.fold()["decoder"])
            else:
                logits = reference_embedding(gpt2, source + target, trainable.embedding.detach())
            target.append(int(logits[-1].argmax()))
        assert text == (target[1 : target.index(END, 1)] if END in target[1:] else target[1:])


def test_adapters_stand_after_each_sublayer(folders):
    model = load_model(folders["bart"])
    names = Adapters(model, 2).names
    assert len(names) == 2 * 2 + 1 * 3 and "decoder.layers.0.encoder_attn.out_proj" in names
    assert len(Adapters(load_model(folders["gpt2"]), 2).names) == 2 * 2


def test_a_row_of_several_targets_is_trained_on_as_its_pairs_alone(case):
    """Loss and gradients of every method, in float64."""
    folder, method = case
    model, trainable = make(folder, method)
    model.double(), trainable.double()
    tokenizer, ends = load_tokenizer(folder), ([0], [2]) if model.encoder_decoder else ([], [END])
    groups = [([*ends[0], 5, 6, 7, *ends[1]], [[40, *ends[1]], [41, 51, 61, *ends[1]], [42, 52, *ends[1]]]),
              ([*ends[0], 8, *ends[1]], [[43, 53, *ends[1]]])]  # fmt: skip
    parameters = [p for p in trainable.parameters() if p.requires_grad]

    def loss_and_gradients(batches):
        loss = sum(target_loss(model, collate(batch, tokenizer, model), trainable()) for batch in batches)
        return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]

    alone = loss_and_gradients([[pair] for pair in singles(pairs_of(groups))])
    assert sum(x is not None for x in alone) > 1
    for a, b in zip(loss_and_gradients([groups]), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- files ----


def test_files_of_other_models_and_damaged_ones(folders, tmp_path):
    path = tmp_path / "x.safetensors"
    for method in ("top2", "adapter", "embedding", "infix"):
        model, trainable = make(folders["gpt2"], method)
        info = {"format": "minprefix", "method": method, "base_model": "tiny", "position_offset": "3",
                "base_fingerprint": json.dumps(fingerprint(load_model(folders["gpt2"])))}  # fmt: skip
        good = {name: tensor.clone() for name, tensor in tensors_of(trainable.fold()).items()}

        def refused(message, tensors, info=info, folder="gpt2"):
            write_safetensors(path, tensors, info)
            with pytest.raises(InputError, match=message):
                load_trained(path, load_model(folders[folder]))

        name = max(good)
        refused("other weights", good, folder="twin")
        refused("made for tiny", good, folder="bart")
        refused("its metadata does not say so", good, {**info, "format": "pt"})
        refused("its metadata does not say so", good, {**info, "method": "magic"})
        refused("fingerprint", good, {**info, "base_fingerprint": "7"})
        refused("not finite", {**good, name: good[name] / 0})
        refused("x.safetensors", {**good, name: good[name][..., :-1]})
        refused("x.safetensors", {**good, name: good[name].sum()})
        refused("x.safetensors", {**good, name: good[name].int()})
        refused("x.safetensors", {**good, "other": torch.ones(3)})
        refused("x.safetensors", {k: v for k, v in good.items() if k != name})
    write_safetensors(path, good, {**info, "method": "adapter"})
    with pytest.raises(InputError, match="is of --method adapter: minprefix.methods.files.load_trained"):
        load_prefix(path)
    for nothing in (tmp_path, folders["gpt2"]):  # a model that was not trained by minprefix is none
        with pytest.raises(InputError, match="nothing at .* that train.py saved"):
            find_trained(nothing)
