"""GPT-2 against committed logits of transformers, and against transformers itself where it is installed."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from minprefix import load_model
from minprefix.core.gpt2 import GPT2
from minprefix.core.prefix_kv import KVPrefix
from minprefix.formats.names import gpt2_from_huggingface as from_huggingface
from minprefix.formats.names import to_huggingface
from minprefix.formats.safetensors import read_safetensors, read_tensors, write_safetensors
from minprefix.system.errors import InputError
from tests.tiny import ROOT

GOLDEN = ROOT / "tests" / "golden"
CONFIG = json.loads((GOLDEN / "tiny-gpt2" / "config.json").read_text())


def golden_model(**config):
    """The committed model in float64, with other settings if given."""
    model = GPT2({**CONFIG, **config}).double().requires_grad_(False)
    model.load_state_dict(from_huggingface(read_tensors(GOLDEN / "tiny-gpt2"), model.config))
    return model


@pytest.fixture(scope="module")
def golden():
    return read_safetensors(GOLDEN / "tiny-gpt2-logits.safetensors")[0]


# ---- committed logits ----


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
@pytest.mark.parametrize("kind", ["none", "shared", "rows"])
def test_golden_logits(golden, activation, kind):
    model = golden_model(activation_function=activation)
    prefix = None if kind == "none" else {"decoder": golden[kind]}
    expected = golden[f"{activation}.{kind}"]
    torch.testing.assert_close(model(golden["ids"], prefix), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.float()(golden["ids"], prefix).double(), expected, rtol=0, atol=1e-4)


def test_golden_logits_from_the_folder(golden):
    logits = load_model(GOLDEN / "tiny-gpt2", dtype=torch.float64)(golden["ids"], {"decoder": golden["rows"]})
    torch.testing.assert_close(logits, golden["gelu_new.rows"], rtol=0, atol=1e-12)


def test_hidden_states_and_logits(golden):
    """`hidden` then `logits` is `forward`; `logits` takes states of any leading shape."""
    model, prefix = golden_model(), {"decoder": golden["shared"]}
    states, expected = model.hidden_states(golden["ids"], prefix), model(golden["ids"], prefix)
    assert torch.equal(model.logits(states), expected)
    torch.testing.assert_close(model.logits(states.flatten(0, 1)[[3, 5]]), expected.flatten(0, 1)[[3, 5]])


def test_position_offset(golden):
    """A plain dict means the prefix length; the offset decides which rows of wpe are read, and nothing else."""
    model, ids, kv = golden_model(), golden["ids"], {"decoder": golden["shared"]}
    P = golden["shared"].size(-2)
    assert torch.equal(model(ids, KVPrefix(kv, P)), model(ids, kv))
    at_zero = model(ids, KVPrefix(kv, 0))
    assert (at_zero - model(ids, kv)).abs().max() > 0.1
    shifted = golden_model()
    shifted.wpe.weight.copy_(model.wpe.weight.roll(P, dims=0))
    torch.testing.assert_close(shifted(ids, kv), at_zero, rtol=0, atol=1e-12)
    assert torch.equal(model.logits(model.hidden_states(ids, kv, start=0)), at_zero)


def test_causal(golden):
    """No token sees a later one; every token sees all of the prefix."""
    model, ids, kv = golden_model(), golden["ids"], golden["shared"]
    before = model(ids, {"decoder": kv})
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 37
    differs = (model(changed, {"decoder": kv}) - before).abs().amax(dim=(0, 2))
    assert differs[:3].max() < 1e-12 and differs[3:].min() > 1e-3
    for p in range(kv.size(-2)):
        other = kv.clone()
        other[..., p, :] += 1
        assert (model(ids, {"decoder": other}) - before).abs().amax(dim=2).min() > 1e-3


def test_too_long(golden):
    model, ids = golden_model(), torch.zeros(1, 24, dtype=torch.long)
    prefix = {"decoder": golden["shared"]}
    assert model(ids).shape == (1, 24, 37) and model(ids[:, :21], prefix).shape == (1, 21, 37)
    with pytest.raises(InputError, match="22 tokens from position 3 on do not fit the model's 24 positions"):
        model(ids[:, :22], prefix)
    with pytest.raises(InputError, match="24 positions"):
        model.prefill(ids[:, :22], torch.tensor([22]), prefix)
    assert model(ids, KVPrefix(prefix, 0)).shape == (1, 24, 37)
    with pytest.raises(InputError, match="25 tokens"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_the_prefix_may_be_in_another_dtype_and_place(golden):
    with torch.device("meta"):
        model = GPT2(CONFIG)
    logits = model(golden["ids"].to("meta"), {"decoder": golden["shared"]})  # float64, in the CPU's memory
    assert logits.shape == (2, 6, 37) and logits.dtype == torch.float32 and logits.device.type == "meta"


# ---- names and shapes of HuggingFace's files ----


def test_to_huggingface_and_back():
    tensors = read_tensors(GOLDEN / "tiny-gpt2")
    back = to_huggingface(golden_model().float())
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (16, 40)  # (in, out) in the file


def test_untied_head():
    model = golden_model()
    head = torch.randn(37, 16, dtype=torch.float64)
    tensors = {**to_huggingface(model), "lm_head.weight": head}
    untied = GPT2({**CONFIG, "tie_word_embeddings": False}).double()
    untied.load_state_dict(from_huggingface(tensors, untied.config))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(untied(ids), model.hidden_states(ids) @ head.T)
    assert torch.equal(to_huggingface(untied)["lm_head.weight"], head)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused():
    tensors = to_huggingface(golden_model())
    wte = tensors["transformer.wte.weight"]
    assert "lm_head.weight" not in from_huggingface({"lm_head.weight": wte.clone(), **tensors}, CONFIG)
    with pytest.raises(InputError, match="'lm_head.weight' and 'wte.weight' differ, .* set it to false"):
        from_huggingface({"lm_head.weight": wte + 1, **tensors}, CONFIG)


def test_a_tensor_under_both_names_is_refused():
    tensors = to_huggingface(golden_model())
    with pytest.raises(InputError, match="'wte.weight' is there twice"):
        from_huggingface({**tensors, "wte.weight": tensors["transformer.wte.weight"]}, CONFIG)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_function": "swish"}, "activation 'swish' is not supported, only gelu, gelu_new, relu"),
        ({"activation_function": None}, "activation None"),
        ({"activation_function": ["gelu"]}, "activation .*gelu"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx is 1, true or false is needed"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ({"n_embd": 15}, "n_embd 15 is not a multiple of n_head 2"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_layer": "2"}, "n_layer is '2'"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_positions": None}, "n_positions is None"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 2**40}, "vocab_size is"),
        ({"n_embd": 16.0}, "n_embd is 16.0"),
        ({"n_inner": "wide"}, "n_inner is 'wide'"),
        ({"n_inner": -4}, "n_inner is -4"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05"),
    ],
)
def test_config_that_cannot_be_followed(change, message):
    with pytest.raises(InputError, match=message), torch.device("meta"):
        GPT2({**CONFIG, **change})


def test_config_defaults():
    sizes = {key: CONFIG[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    config = GPT2(sizes).config
    assert config["n_inner"] == 64 and config["activation_function"] == "gelu_new" and config["tie_word_embeddings"]
    assert config["layer_norm_epsilon"] == 1e-5 and GPT2({**sizes, "n_inner": None}).config["n_inner"] == 64
    with pytest.raises(InputError, match="n_layer is None"):
        GPT2({key: size for key, size in sizes.items() if key != "n_layer"})


# ---- beside transformers itself ----


def transformers():
    return pytest.importorskip("transformers", reason="compares with transformers (pip install minprefix[parity])")


def their_logits(model, ids, prefix=None):
    """prefix: (L, 2, H, P, D) or (L, 2, B, H, P, D)."""
    if prefix is None:
        return model(ids).logits
    prefix = prefix if prefix.dim() == 6 else prefix.unsqueeze(2).expand(-1, -1, len(ids), -1, -1, -1)
    cache = transformers().DynamicCache()
    for layer, (k, v) in enumerate(prefix):
        cache.update(k, v, layer)
    return model(ids, past_key_values=cache).logits


def random_models(n_layer):
    """GPT-2 small's shape with seeded random weights and a small vocabulary: (transformers' model, ours), float32."""
    torch.manual_seed(0)
    hf = transformers()
    config = hf.GPT2Config(vocab_size=300, n_layer=n_layer, bos_token_id=0, eos_token_id=0)
    assert (config.n_embd, config.n_head, config.n_positions) == (768, 12, 1024)
    theirs = hf.GPT2LMHeadModel(config).eval().requires_grad_(False)
    with torch.device("meta"):
        ours = GPT2(theirs.config.to_dict())
    ours.load_state_dict(from_huggingface(theirs.state_dict(), ours.config), assign=True)
    return theirs, ours.requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    return random_models(n_layer=12)


def test_float32_logits_of_all_positions_equal_transformers():
    """In fewer layers, for speed: the deep model is compared at as many positions, with a prefix."""
    theirs, ours = random_models(n_layer=3)
    ids = torch.randint(300, (1, 1024))
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 2e-4


@pytest.mark.parametrize("P, rows, lengths", [(0, False, [1, 7]), (10, False, [1, 7, 1014]), (5, True, [1, 7])])
def test_float32_logits_equal_transformers(small, P, rows, lengths):
    theirs, ours = small
    torch.manual_seed(P)
    for T in lengths:
        B = 1 if T > 100 else 3
        ids = torch.randint(300, (B, T))
        prefix = torch.randn(12, 2, *([B] if rows else []), 12, P, 64) if P else None
        expected = their_logits(theirs, ids, prefix)
        assert (ours(ids, prefix if prefix is None else {"decoder": prefix}) - expected).abs().max() <= 2e-4
        assert expected.abs().max() > 1


def test_float64_logits_and_prefix_gradient_equal_transformers(small):
    """The gradient is that of the summed target loss, relative to its largest number."""
    theirs, ours = small
    theirs, ours = theirs.double(), ours.double()
    torch.manual_seed(1)
    ids, labels = torch.randint(300, (2, 11)), torch.randint(300, (2, 5))
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-10
    for shape in ((12, 2, 12, 5, 64), (12, 2, 2, 12, 5, 64)):
        prefix = torch.randn(shape, dtype=torch.float64)
        gradients = []
        for run in (lambda kv: ours(ids, {"decoder": kv}), lambda kv: their_logits(theirs, ids, kv)):
            leaf = prefix.clone().requires_grad_()
            logits = run(leaf)
            F.cross_entropy(logits[:, 6:].flatten(0, 1), labels.flatten(), reduction="sum").backward()
            gradients.append((logits.detach(), leaf.grad))
        (logits, gradient), (their, expected) = gradients
        assert (logits - their).abs().max() <= 1e-10
        assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max() and expected.abs().min() > 0


@pytest.mark.parametrize("upcast, dtype, error", [(False, torch.float64, 1e-12), (True, torch.float32, 1e-5)])
def test_scores_scaled_by_the_layer_equal_transformers(upcast, dtype, error):
    """Those of the prefix, too, and step by step. reorder_and_upcast_attn is how such models compute, not what."""
    hf, scaled = transformers(), {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": upcast}
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(hf.GPT2Config(**{**CONFIG, **scaled}, attn_implementation="eager")).eval()
    theirs = theirs.requires_grad_(False).to(dtype)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    ours, unscaled = (GPT2(config).to(dtype).requires_grad_(False) for config in (theirs.config.to_dict(), CONFIG))
    for model in (ours, unscaled):
        model.load_state_dict(from_huggingface(theirs.state_dict(), ours.config))
    ids, prefix = torch.randint(37, (2, 6)), torch.randn(2, 2, 2, 3, 8, dtype=dtype)
    for kv in (None, prefix):
        expected, taken = their_logits(theirs, ids, kv), None if kv is None else {"decoder": kv}
        torch.testing.assert_close(ours(ids, taken), expected, rtol=0, atol=error)
        cache = ours.prefill(ids[:, :5], torch.tensor([5, 5]), taken)
        torch.testing.assert_close(ours.logits(ours.step(ids[:, 5], cache)), expected[:, 5], rtol=0, atol=error)
        assert (unscaled(ids, taken) - expected).abs().max() > 100 * error


def test_folders_go_both_ways(tmp_path):
    """transformers' save_pretrained loads here, what is written here loads there: equal logits, tied and untied."""
    hf = transformers()
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    for tied in (True, False):
        folder, ours_folder = tmp_path / f"theirs-{tied}", tmp_path / f"ours-{tied}"
        torch.manual_seed(0)
        config = {**CONFIG, "tie_word_embeddings": tied}
        theirs = hf.GPT2LMHeadModel(hf.GPT2Config(**config)).eval()
        theirs.save_pretrained(folder)
        ours = load_model(folder)
        expected = theirs(ids).logits.detach()
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-6)
        ours_folder.mkdir()
        shutil.copy(folder / "config.json", ours_folder)
        write_safetensors(ours_folder / "model.safetensors", to_huggingface(ours), {"format": "pt"})
        again, report = hf.GPT2LMHeadModel.from_pretrained(ours_folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again.eval()(ids).logits, expected)
