"""PEFT adapters in and out, against PEFT itself; and adapters that are damaged, hostile or of another kind."""

import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import sample
from minprefix import Prefix, load_model, load_prefix
from minprefix.cli import prefix_tool
from minprefix.core.generate import generate_ids
from minprefix.core.prefix_kv import KVPrefix
from minprefix.formats.prefix_file import save_prefix
from minprefix.formats.safetensors import read_safetensors, write_safetensors
from minprefix.studies.contenders import peer_generate
from minprefix.system.errors import InputError
from tests.helpers import call
from tests.tiny import ROOT, write_tiny_bart, write_tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
BART_LAYERS = {"encoder_layers": 4, "decoder_layers": 4, "decoder_attention_heads": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    write_tiny_model(folder / "gpt2")
    write_tiny_model(folder / "twin", seed=1)
    write_tiny_bart(folder / "alike", decoder_layers=2, decoder_attention_heads=4)  # its decoder is of gpt2's shape
    write_tiny_bart(folder / "bart", **BART_LAYERS)
    write_tiny_bart(folder / "bart3", **BART_LAYERS | {"encoder_layers": 3, "decoder_layers": 3})
    return folder


@pytest.fixture(autouse=True)
def in_world(world, monkeypatch):
    monkeypatch.chdir(world)


def trained(name, path, **options):
    """A random prefix for a model's folder, saved -> (model, prefix)."""
    torch.manual_seed(1)
    model = load_model(name)
    prefix = Prefix(model, 5, 16, sites="decoder", **options).fold()
    save_prefix(path, prefix, model, {"base_model": name, "task": "e2e"})
    return model, prefix


def inputs(model):
    return (IDS, IDS.flip(0)) if model.encoder_decoder else (IDS,)


def peft_logits(name, adapter):
    """What transformers and PEFT make of a model's folder, alone (adapter None) or with an adapter's."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    kind = transformers.GPT2LMHeadModel if name == "gpt2" else transformers.BartForConditionalGeneration
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(name), adapter).eval()
    with torch.no_grad():
        return model(input_ids=IDS, **({} if name == "gpt2" else {"decoder_input_ids": IDS.flip(0)})).logits


@pytest.mark.parametrize("name", ["gpt2", "bart", "bart3"])
def test_export_gives_peft_the_same_logits_and_import_the_same_file(name, world, capsys):
    model, prefix = trained(name, "ours.safetensors")
    assert call(prefix_tool, capsys, "export", "--prefix", "ours.safetensors", "--to", f"to-{name}")[0] == 0
    expected = model(*inputs(model), prefix=prefix)
    torch.testing.assert_close(peft_logits(name, f"to-{name}"), expected, rtol=0, atol=1e-5)
    assert (expected - model(*inputs(model))).abs().max() > 0.01
    assert call(prefix_tool, capsys, "import", "--prefix", f"to-{name}", "--to", "back.safetensors")[0] == 0
    ours, back = read_safetensors("ours.safetensors"), read_safetensors("back.safetensors")
    assert torch.equal(ours[0]["decoder"], back[0]["decoder"])
    assert {**ours[1], "base_model": ""} == {**back[1], "base_model": ""}  # a name, a path


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_texts_by_an_exported_adapter(name, tmp_path, capsys):
    """PEFT's own generate leaves the prefix out, as export says; by the call that it names, the texts are the same."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    gpt2, folder, exported = name == "gpt2", ROOT / "weights" / f"{name}-mini", tmp_path / "adapter"
    torch.manual_seed(1)
    model = load_model(folder)
    kv = {"decoder": 2 * torch.randn_like(Prefix(model, 5, 16, sites="decoder").fold()["decoder"])}
    prefix, end = KVPrefix(kv, 5, {}), 4095 if gpt2 else 2
    save_prefix(tmp_path / "p", prefix, model, {"base_model": str(folder)})
    code, out, _ = call(prefix_tool, capsys, "export", "--prefix", tmp_path / "p", "--to", exported)
    assert code == 0 and "generate leaves the prefix out" in out and "get_prompt(" in out
    kind = transformers.GPT2LMHeadModel if gpt2 else transformers.BartForConditionalGeneration
    alone, base = (kind.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    adapted = peft.PeftModel.from_pretrained(base, exported).eval()
    if (peft.__version__, transformers.__version__) == ("0.21.2", "5.24.0"):
        first = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        logits = adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), pad_token_id=1, **first).logits[0]
        where = {"position_ids": 5 + torch.arange(5)[None]} if gpt2 else {"decoder_input_ids": torch.full((2, 1), 2)}
        torch.testing.assert_close(logits, alone(input_ids=IDS, **where).logits[:, -1], rtol=0, atol=1e-4)

    sources = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    rows = [torch.tensor([*source, end] if gpt2 else source) for source in sources]
    ids, mask = (pad_sequence(x, batch_first=True, padding_side="left" if gpt2 else "right")
                 for x in (rows, [torch.ones_like(row) for row in rows]))  # fmt: skip
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    for beams in (1, 3):
        ours = generate_ids(model, sources, end, end, prefix, beams=beams, **options)
        base.generation_config.update(eos_token_id=end, forced_bos_token_id=None, forced_eos_token_id=None)
        theirs = peer_generate(adapted, ids, mask, beams, pad_token_id=1, **options)
        assert theirs[:, -8:].tolist() == ours != generate_ids(model, sources, end, end, None, beams=beams, **options)


@pytest.mark.parametrize(
    "name, projection, bin_file",
    [("gpt2", False, False), ("gpt2", True, True), ("bart", True, False), ("bart3", False, False)],
)
def test_an_adapter_of_peft_gives_its_logits(name, projection, bin_file, tmp_path, capsys):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    task = "CAUSAL_LM" if name == "gpt2" else "SEQ_2_SEQ_LM"
    kind = transformers.GPT2LMHeadModel if name == "gpt2" else transformers.BartForConditionalGeneration
    torch.manual_seed(2)
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, prefix_projection=projection)
    adapted = peft.get_peft_model(kind.from_pretrained(name), config)
    torch.nn.init.normal_(adapted.prompt_encoder["default"].embedding.weight)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter, safe_serialization=not bin_file)
    assert (adapter / "adapter_model.bin").exists() == bin_file
    model = load_model(name)
    prefix, expected = load_prefix(adapter, model), peft_logits(name, adapter)
    torch.testing.assert_close(model(*inputs(model), prefix=prefix), expected, rtol=0, atol=1e-5)
    assert (expected - model(*inputs(model))).abs().max() > 0.01
    call(prefix_tool, capsys, "import", "--prefix", adapter, "--to", tmp_path / "p", "--model", name)
    imported = load_prefix(tmp_path / "p", model)
    assert torch.equal(imported["decoder"], prefix["decoder"]) and imported.position_offset == 3


def test_sample_takes_an_adapter_as_it_takes_the_file(world, capsys):
    trained("gpt2", "ours.safetensors")
    call(prefix_tool, capsys, "export", "--prefix", "ours.safetensors", "--to", "adapter")
    texts = [call(sample, capsys, "--prefix", prefix, "--input", "name[The Mill]", "--max-new-tokens", 5)
             for prefix in ("ours.safetensors", "adapter")]  # fmt: skip
    assert texts[0][0] == 0 and texts[0][:2] == texts[1][:2], texts


def test_what_peft_cannot_express_is_refused(world, capsys):
    trained("gpt2", "offset.safetensors", position_offset=0)
    model = load_model("bart")
    save_prefix("sites.safetensors", Prefix(model, 5).fold(), model, {"base_model": "bart"})
    for path, message in (("offset", "start at position 0, PEFT's at the prefix length"), ("sites", "decoder's only")):
        code, _, err = call(prefix_tool, capsys, "export", "--prefix", f"{path}.safetensors", "--to", "never")
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not (world / "never").exists()


CONFIG = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_layers": 2,
          "num_attention_heads": 4, "token_dim": 32, "base_model_name_or_path": "gpt2"}  # fmt: skip
GOOD = torch.zeros(3, 128)


@pytest.mark.parametrize(
    "config, tensors, info, message",
    [
        ({"peft_type": "LORA"}, None, {}, "'LORA'"),
        ({"peft_type": ["PREFIX_TUNING"]}, None, {}, "peft_type"),
        ({"peft_type": "PROMPT_TUNING"}, None, {}, "peft_type is 'PROMPT_TUNING', only PREFIX_TUNING is a prefix"),
        ({"peft_type": ...}, None, {}, "peft_type is None"),
        ({"num_virtual_tokens": ...}, None, {}, "num_virtual_tokens is None"),
        ({"num_layers": ...}, None, {}, "num_layers is None"),
        ({"num_attention_heads": ...}, None, {}, "num_attention_heads is None"),
        ({"token_dim": ...}, None, {}, "token_dim is None"),
        ({"num_layers": 3}, None, {}, r"\(3, 128\).* asks for \(3, 192\)"),
        ({"token_dim": 64}, None, {}, r"\(3, 128\).* asks for \(3, 256\)"),
        ({"num_layers": 1, "token_dim": 64}, None, {}, r"\(layers, heads, dim\) \(1, 4, 16\), this model \(2, 4, 8\)"),
        ({"num_layers": 4, "token_dim": 16}, None, {}, r"\(layers, heads, dim\) \(4, 4, 4\), this model \(2, 4, 8\)"),
        ({"task_type": "SEQ_2_SEQ_LM"}, None, {},
         "made for gpt2, a model of another kind: its task_type is SEQ_2_SEQ_LM, this model needs CAUSAL_LM"),
        ({"num_virtual_tokens": 4}, None, {}, r"\(3, 128\).* asks for \(4, 128\)"),
        ({"num_virtual_tokens": 2**40}, None, {}, "num_virtual_tokens is 1099511627776"),
        ({"num_virtual_tokens": True}, None, {}, "num_virtual_tokens is True"),
        ({"num_layers": "2"}, None, {}, "num_layers is '2'"),
        ({"num_layers": 0}, None, {}, "num_layers is 0"),
        ({"token_dim": None}, None, {}, "token_dim is None"),
        ({"num_attention_heads": 5}, None, {}, "no multiple"),
        ({"num_attention_heads": 8}, None, {}, r"\(layers, heads, dim\) \(2, 8, 4\), this model \(2, 4, 8\)"),
        ({"num_transformer_submodules": 2}, None, {}, "num_transformer_submodules is 2"),
        ({"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}, None, {}, "num_transformer_submodules is 1"),
        ({"task_type": "SEQ_2_SEQ_LM"}, None, {"decoder_layers": "3"}, "decoder_layers is '3'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, None, {"decoder_layers": "0000000000001"}, "decoder_layers"),
        ({}, {"prompt_embeddings": GOOD, "score.weight": GOOD}, {}, "prompt_embeddings, score.weight"),
        ({}, {}, {}, "holds none"),
        ({}, {"prompt_embeddings": GOOD.long()}, {}, "torch.int64"),
        ({}, {"prompt_embeddings": GOOD + float("nan")}, {}, "not finite"),
        ({}, {"prompt_embeddings": GOOD.index_fill(1, torch.tensor(127), float("-inf"))}, {}, "not finite"),
        ({}, None, {"base_fingerprint": "[1.0]"}, "other weights"),
        ({}, None, {"base_fingerprint": "x"}, "fingerprint"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(config, tensors, info, message, tmp_path):
    write_folder(tmp_path, config, tensors, info)
    with pytest.raises(InputError, match=message) as caught:
        load_prefix(tmp_path, load_model("gpt2"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_peft_is_not_exported_again(tmp_path, capsys):
    """What the kind of its model is stands elsewhere in it than in our files; and it is in PEFT's format."""
    write_folder(tmp_path, {"task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": "bart"})
    code, _, err = call(prefix_tool, capsys, "export", "--prefix", tmp_path, "--to", tmp_path / "again")
    assert code == 2 and err == f"error: {tmp_path} is a PEFT adapter already: there is nothing to export\n"
    assert not (tmp_path / "again").exists()


def write_folder(folder, config, tensors=None, info=None):
    """An adapter for gpt2 but for what differs in `config`; ... is a key that is not there."""
    config = {key: value for key, value in {**CONFIG, **config}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"prompt_embeddings": GOOD} if tensors is None else tensors
    write_safetensors(folder / "adapter_model.safetensors", tensors, info)


def test_an_adapter_for_gpt2_does_not_fit_a_bart_of_the_same_shape(tmp_path, world):
    write_folder(tmp_path, {})
    load_prefix(tmp_path, load_model("gpt2"))
    for task_type in ("CAUSAL_LM", None, ..., ["SEQ_2_SEQ_LM"], "x" * 5000):
        write_folder(tmp_path, {"task_type": task_type})
        with pytest.raises(InputError, match="this model needs SEQ_2_SEQ_LM") as caught:
            load_prefix(tmp_path, load_model("alike"))
        assert len(str(caught.value)) < 500
    write_folder(tmp_path, {"task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": "alike"})
    load_prefix(tmp_path, load_model("alike"))


def test_a_decoder_of_fewer_layers_than_the_encoder_takes_the_first(tmp_path):
    """PEFT's adapter has as many layers as the encoder."""
    sizes = {"encoder_layers": 4, "decoder_layers": 2, "decoder_attention_heads": 4}
    model, table = load_model(write_tiny_bart(tmp_path / "short", **sizes)), torch.randn(3, 4 * 2 * 32)
    kind = {"task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": "elsewhere"}
    write_folder(tmp_path, {**kind, "num_layers": 4}, {"prompt_embeddings": table})
    layers = table.view(3, 4, 2, 4, 8).permute(1, 2, 3, 0, 4)
    assert torch.equal(load_prefix(tmp_path, model)["decoder"], layers[[0, 2]])
    write_folder(tmp_path, {**kind, "num_layers": 3}, {"prompt_embeddings": table[:, : 3 * 64]})
    with pytest.raises(InputError, match=r"\(layers, heads, dim\) \(3, 4, 8\), this model \(2, 4, 8\)"):
        load_prefix(tmp_path, model)


def test_an_adapter_fits_every_model_of_its_shape(tmp_path):
    """PEFT's files name the base model, but say nothing of its weights: the name is not looked up."""
    for base in ("gpt2", "elsewhere/gpt2", "", None, ..., "a\0b", "n" * 5000):
        write_folder(tmp_path, {"base_model_name_or_path": base})
        load_prefix(tmp_path, load_model("gpt2"))
        load_prefix(tmp_path, load_model("twin", dtype=torch.bfloat16))


def test_folders_that_are_no_adapter(tmp_path, world, capsys):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="neither adapter_model.safetensors nor"):
        load_prefix(tmp_path)
    torch.save({"prompt_embeddings": torch.zeros(1).expand(3, 128)}, tmp_path / "adapter_model.bin")
    config.write_text(json.dumps({**CONFIG, "num_virtual_tokens": 2**19, "token_dim": 2**19}))
    torch.save({"prompt_embeddings": torch.zeros(1).expand(2**19, 2**21)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="larger than what is stored"):
        load_prefix(tmp_path)
    torch.save({"prompt_embeddings": print}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="can run code"):
        load_prefix(tmp_path)
    for text in ("[]", "{", ""):
        config.write_text(text)
        with pytest.raises(InputError):
            load_prefix(tmp_path)
    code, _, err = call(prefix_tool, capsys, "import", "--prefix", "gpt2", "--to", "never")
    assert code == 2 and "no adapter_config.json" in err
