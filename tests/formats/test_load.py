"""A model from every kind of folder that HuggingFace has written, and what is refused."""

import json
import shutil

import pytest
import torch

from minprefix import Prefix, generate, load_model, load_tokenizer
from minprefix.core.encode import check_vocabulary, encode_sources, end_ids
from minprefix.formats.load import pick_writing_dtype
from minprefix.formats.safetensors import read_safetensors, read_tensors, write_safetensors
from minprefix.system.device import pick_device, pick_dtype
from minprefix.system.errors import InputError
from tests.helpers import complaint
from tests.tiny import ROOT, write_tiny_bart, write_tiny_model

TINY = ROOT / "tests" / "golden" / "tiny-gpt2"
CONFIG = json.loads((TINY / "config.json").read_text())
TENSORS = read_tensors(TINY)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_buffers(tensors):
    """The causal masks that older checkpoints hold."""
    mask = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
    for layer in range(2):
        tensors = {**tensors, f"transformer.h.{layer}.attn.bias": mask}
        tensors = {**tensors, f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    return tensors


def with_head(tensors):
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}


def write(folder, tensors, form="safetensors", config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    shards = {1: [names], 2: [names[:9], names[9:]]}[2 if form.startswith("sharded") else 1]
    stem, ext = ("pytorch_model", "bin") if form.endswith("bin") else ("model", "safetensors")
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}.{ext}" if len(shards) == 1 else f"{stem}-{i:05}-of-{len(shards):05}.{ext}"
        weight_map |= dict.fromkeys(shard, name)
        part = {key: tensors[key] for key in shard}
        if ext == "bin":
            torch.save(part, folder / name)
        else:
            write_safetensors(folder / name, part, {"format": "pt"})
    if len(shards) > 1:
        (folder / f"{stem}.{ext}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def tiny():
    golden = read_safetensors(TINY.parent / "tiny-gpt2-logits.safetensors")[0]
    model = load_model(TINY, dtype=torch.float64)
    torch.testing.assert_close(model(golden["ids"]), golden["gelu_new.none"], rtol=0, atol=1e-12)
    return model


def assert_same(model, other):
    """The same weights, bit for bit; a product's last bits depend on where in memory they lie."""
    weights = other.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    torch.testing.assert_close(model(IDS), other(IDS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("change", [dict, bare, with_buffers, with_head, lambda t: bare(with_buffers(with_head(t)))])
def test_every_layout_gives_the_same_model(tmp_path, tiny, form, change):
    assert_same(load_model(write(tmp_path / "m", change(TENSORS), form), dtype=torch.float64), tiny)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtypes(tmp_path, tiny, stored):
    halves = {name: tensor.to(stored) for name, tensor in TENSORS.items()}
    model = load_model(write(tmp_path / "m", halves), dtype=torch.float64)
    assert 1e-6 < (model(IDS) - tiny(IDS)).abs().max() < 0.5 or stored == torch.float64
    exact = write(tmp_path / "exact", {name: tensor.double() for name, tensor in halves.items()})
    assert_same(model, load_model(exact, dtype=torch.float64))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_model(tmp_path / "m", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype} and model(IDS).dtype == dtype


def test_mixed_dtypes(tmp_path):
    mixed = {name: tensor.half() if i % 2 else tensor for i, (name, tensor) in enumerate(TENSORS.items())}
    model = load_model(write(tmp_path / "m", mixed))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model(IDS).isfinite().all()


def test_frozen_and_in_eval_mode():
    model = load_model(TINY)
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    assert not model(IDS).requires_grad
    assert not any(p.is_meta for p in model.parameters()) and not list(model.buffers())


def test_the_file_is_never_changed(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_untied_head(tmp_path, tiny):
    config = {**CONFIG, "tie_word_embeddings": False}
    untied = write(tmp_path / "m", {**TENSORS, "lm_head.weight": 2 * TENSORS["transformer.wte.weight"]}, config=config)
    logits = load_model(untied, dtype=torch.float64)(IDS)
    torch.testing.assert_close(logits, 2 * tiny(IDS), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="lacks 1 of the model's 29 tensors, first 'lm_head.weight'"):
        load_model(write(tmp_path / "m", TENSORS, config=config))


@pytest.mark.parametrize("start", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models(tmp_path, tiny, start):
    """As torch.compile and DDP save them, whole or in part."""
    assert_same(load_model(write(tmp_path / "m", renamed(start)), dtype=torch.float64), tiny)
    part = {name.replace(".h.1.", f".h.1.{start}"): tensor for name, tensor in TENSORS.items()}
    assert_same(load_model(write(tmp_path / "part", part), dtype=torch.float64), tiny)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_what_safetensors_save_model_writes(tmp_path, kind):
    """Of tensors that share their memory it keeps one name: GPT-2's table is lm_head.weight then, and nothing else."""
    transformers = pytest.importorskip("transformers", reason="saves a model of transformers")
    save_model = pytest.importorskip("safetensors.torch", reason="saves by the safetensors package").save_model
    folder = shutil.copytree(TINY, tmp_path / "m") if kind == "gpt2" else write_tiny_bart(tmp_path / "m")
    names = {"gpt2": "GPT2LMHeadModel", "bart": "BartForConditionalGeneration"}
    theirs = getattr(transformers, names[kind]).from_pretrained(folder)
    expected = load_model(folder)
    save_model(theirs, folder / "model.safetensors")
    stored = read_safetensors(folder / "model.safetensors")[0]
    assert kind == "bart" or ("lm_head.weight" in stored and "transformer.wte.weight" not in stored)
    assert all(torch.equal(p, expected.state_dict()[name]) for name, p in load_model(folder).state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["GPT2ForSequenceClassification", "GPT2DoubleHeadsModel", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
     "BartForSequenceClassification", "BartForQuestionAnswering"],
)  # fmt: skip
def test_heads_that_generation_does_not_need(tmp_path, capsys, name):
    """They are left out, and that is said in one line; the rest is what transformers takes for generation."""
    transformers = pytest.importorskip("transformers", reason="saves a model of transformers")
    folder = shutil.copytree(TINY, tmp_path / "m") if "GPT2" in name else write_tiny_bart(tmp_path / "m")
    getattr(transformers, name).from_pretrained(folder).save_pretrained(folder)
    language = "GPT2LMHeadModel" if "GPT2" in name else "BartForConditionalGeneration"
    theirs = getattr(transformers, language).from_pretrained(folder).eval()
    inputs = {"input_ids": IDS, **({} if "GPT2" in name else {"decoder_input_ids": IDS})}
    capsys.readouterr()
    ours = load_model(folder)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "which generation does not need" in lines[0], lines
    torch.testing.assert_close(ours(*inputs.values()), theirs(**inputs).logits, rtol=0, atol=1e-5)


def test_a_value_head_is_left_out(tmp_path, tiny, capsys):
    """As trl saves it for reinforcement learning."""
    head = {"v_head.summary.weight": torch.zeros(1, 16), "v_head.summary.bias": torch.zeros(1)}
    folder = write(tmp_path / "m", {**TENSORS, **head})
    assert_same(load_model(folder, dtype=torch.float64), tiny)
    left_out = "left out v_head.summary.bias, v_head.summary.weight, which generation does not need"
    assert capsys.readouterr().err == f"{folder}: {left_out}\n"


def changed(**change):
    """The tensors with some replaced, or dropped where the new one is None."""
    change = {f"transformer.{name.replace('__', '.')}": tensor for name, tensor in change.items()}
    return {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}


def renamed(start):
    return {start + name: tensor for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (changed(wpe__weight=None), "lacks 1 of the model's 28 tensors, first 'wpe.weight'"),
        ({}, "lacks 28 of the model's 28 tensors"),
        (changed(h__2__ln_1__bias=torch.zeros(16)), "does not know, 1 .*'h.2.ln_1.bias'"),
        (changed(wte__weight=torch.zeros(38, 16)), r"'wte.weight' has shape \(38, 16\), .* needs \(37, 16\)"),
        (changed(h__1__mlp__c_fc__weight=torch.zeros(40, 16)), r"'h.1.mlp.c_fc.weight' has shape \(16, 40\)"),
        (changed(h__1__mlp__c_fc__weight=torch.zeros(640)), r"'h.1.mlp.c_fc.weight' has shape \(640,\)"),
        (changed(ln_f__bias=torch.zeros(16, dtype=torch.int32)), "'ln_f.bias' holds torch.int32"),
        ({**TENSORS, "wte.weight": torch.zeros(37, 16)}, "'wte.weight' is there twice"),
        ({**TENSORS, "module.transformer.wpe.weight": torch.zeros(24, 16)}, "is there twice, with and without"),
        (renamed("lm."), "it has 'lm.transformer.h.0.attn.c_attn.bias': rename its tensors without 'lm.transformer.'"),
        ({"layers.0.bias": torch.zeros(3)}, "lacks 28 of .*; it has 'layers.0.bias' instead: it is of another kind"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message):
        load_model(write(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "t5"}, "model_type is 't5', minprefix runs gpt2 and bart"),
        ({"model_type": ["gpt2"]}, r"model_type is \['gpt2'\], minprefix runs"),
        ({"model_type": "bart"}, "config.json of the BART model: max_position_embeddings is None"),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "swish"}, "activation 'swish'"),
        ({"n_layer": 3}, "lacks 12 of the model's 40 tensors, first 'h.2.attn.c_attn.bias'"),
        ({"n_positions": 48}, r"'wpe.weight' has shape \(24, 16\), the model needs \(48, 16\)"),
    ],
)
def test_other_configs_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        load_model(write(tmp_path / "m", TENSORS, config={**CONFIG, **config}))


def test_missing_folder_or_files(tmp_path):
    with pytest.raises(InputError, match="no model 'no-such-model'"):
        load_model("no-such-model")
    with pytest.raises(InputError, match="no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="no weights"):
        load_model(tmp_path)


def test_pick_device(monkeypatch):
    for cuda, mps, expected in ((True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto") == expected and pick_device("cpu") == "cpu"
        for name, there in (("cuda", cuda), ("mps", mps)):
            if there:
                assert pick_device(name) == name
            else:
                with pytest.raises(InputError, match=f"--device {name}"):
                    pick_device(name)


def test_pick_dtype(monkeypatch):
    for device in ("cpu", "cuda", "mps"):
        assert pick_dtype("float32", device) == torch.float32 and pick_dtype("bfloat16", device) == torch.bfloat16
    assert pick_dtype("auto", "mps") == torch.float32
    for flags, expected in (({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16),
                            ({"avx512_bf16": False}, torch.float32), ({}, torch.float32)):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert pick_dtype("auto", "cpu") == expected


def test_narrow_models_write_in_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "n_embd": 512, "n_head": 4}))
    for folder, expected in ((TINY, torch.float32), (tmp_path, torch.bfloat16)):
        assert pick_writing_dtype("auto", "cpu", folder) == expected
        assert pick_writing_dtype("bfloat16", "cpu", folder) == torch.bfloat16


def test_a_tokeniser_with_a_mask_that_the_model_lacks_is_no_other_models(tmp_path):
    """bart-large-cnn and bart-large-xsum have 50,264 embeddings, and a tokeniser whose <mask> is number 50,264."""
    folder = write_tiny_bart(tmp_path / "cnn", vocab_size=4099)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert tokenizer.special["<mask>"] == 4099
    check_vocabulary(tokenizer, model, folder)
    with pytest.raises(InputError, match="ids up to 4098, the model embeddings for 4098"):
        check_vocabulary(tokenizer, load_model(write_tiny_bart(tmp_path / "less", vocab_size=4098)), folder)


def test_the_tokens_that_generation_config_names(tmp_path):
    """transformers 5 moves them there; what that file does not name is not forced."""
    folder = write_tiny_bart(tmp_path / "bart", forced_bos_token_id=0, decoder_start_token_id=2)
    (folder / "generation_config.json").write_text('{"forced_eos_token_id": 3, "num_beams": 4}')
    keys = ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id")
    assert [load_model(folder).config[key] for key in keys] == [None, 3, 2]
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 0, "forced_bos_token_id": 5}')
    assert [load_model(folder).config[key] for key in keys] == [5, None, 0]
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match="generation_config.json holds a JSON list"):
        load_model(folder)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"force_bos_token_to_be_generated": True, "bos_token_id": 0}, 0),
        ({"force_bos_token_to_be_generated": True, "bos_token_id": 3, "forced_bos_token_id": None}, 3),
        ({"force_bos_token_to_be_generated": False, "bos_token_id": 3}, None),
        ({"force_bos_token_to_be_generated": True, "bos_token_id": 0, "forced_bos_token_id": 0}, 0),
    ],
)
def test_old_bart_configs_force_the_first_token(tmp_path, config, expected):
    """As in transformers; a generation_config.json goes before it there, too."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    folder = write_tiny_bart(tmp_path / "bart")
    written = {key: v for key, v in json.loads((folder / "config.json").read_text()).items() if "forced_bos" not in key}
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    for generation in (None, {"forced_bos_token_id": 5}, {"eos_token_id": 2}):
        if generation:
            (folder / "generation_config.json").write_text(json.dumps(generation))
            expected = generation.get("forced_bos_token_id")
        theirs = transformers.BartForConditionalGeneration.from_pretrained(folder).generation_config
        assert load_model(folder).config["forced_bos_token_id"] == theirs.forced_bos_token_id == expected


# ---- the model's end tokens ----


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_texts_of_a_model_alone_end_where_transformers_ends_them(tmp_path, kind, file, beams):
    """eos_token_id is a number or a list: any of them ends a text, which an ordinary token stays in."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers' generate")
    folder = shutil.copytree(ROOT / "weights" / f"{kind}-mini", tmp_path / "m")
    tokenizer, sources = load_tokenizer(folder), [f"name : {word} | food : fish" for word in ("A", "Bar", "The End")]
    options, model = {"beams": beams, "max_new_tokens": 16, "one_line": False}, load_model(folder)
    unchanged = generate(model, tokenizer, sources, **options)
    one, two, three = (tokenizer.encode(f" {text}")[6] for text in unchanged)
    for ends in (one, [two], [tokenizer.end_id, three, one], [two, 10**6]):
        config = json.loads((folder / "config.json").read_text())
        if file != "config.json":
            config = {key: config[key] for key in config if "forced" in key or "start" in key}
        (folder / file).write_text(json.dumps({**config, "eos_token_id": ends}))
        named = {"gpt2": "GPT2LMHeadModel", "bart": "BartForConditionalGeneration"}[kind]
        theirs = getattr(transformers, named).from_pretrained(folder, dtype=torch.float32).eval()
        model, expected = load_model(folder), []
        for ids in encode_sources(sources, tokenizer, model):
            ids = torch.tensor([ids if kind == "bart" else [*ids, tokenizer.end_id]])
            written = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_id,
                                      max_new_tokens=16, num_beams=beams, do_sample=False)  # fmt: skip
            new = written[0, 0 if kind == "bart" else ids.size(1) :].tolist()
            expected.append(tokenizer.decode(i for i in new if i not in tokenizer.special.values()).strip())
        assert generate(model, tokenizer, sources, **options) == expected != unchanged, ends


def test_a_prefix_keeps_the_end_token_that_it_was_trained_with(tmp_path):
    """train.py's targets end with the tokeniser's end token, whatever the model's config.json names."""
    folder = shutil.copytree(ROOT / "weights" / "gpt2-mini", tmp_path / "m")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ends = tokenizer.encode(f" {generate(model, tokenizer, ['x'])[0]}")[2:4]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    other, prefix = load_model(folder), Prefix(model, 3).fold()
    assert end_ids(other, tokenizer) == ends and end_ids(other, tokenizer, prefix) == [tokenizer.end_id]
    assert generate(other, tokenizer, ["x"], prefix) == generate(model, tokenizer, ["x"], prefix)
    assert generate(other, tokenizer, ["x"]) != generate(model, tokenizer, ["x"])


@pytest.mark.parametrize("value", [None, [], [10**6], -1])
def test_without_an_end_token_in_the_vocabulary_the_tokenisers_ends_texts(tmp_path, value):
    folder = write_tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": value}))
    assert end_ids(load_model(folder), load_tokenizer(folder)) == [4095]


@pytest.mark.parametrize("value", ["</s>", True, 2.0, ["x"], [None], {}])
@pytest.mark.parametrize("write_model", [write_tiny_model, write_tiny_bart])
def test_end_tokens_that_are_no_ids_are_refused(tmp_path, write_model, value):
    folder = write_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "eos_token_id is" in complaint(load_model, folder)
