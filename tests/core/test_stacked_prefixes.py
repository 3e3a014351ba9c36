"""Several prefixes in one batch (section 8 of the paper): each row as if it were alone, at every site."""

import json

import pytest
import torch

import sample
from minprefix import Prefix, load_model, stack_prefixes
from minprefix.cli import requests
from minprefix.core.attention import causal_mask
from minprefix.core.bart import BART
from minprefix.core.generate import generate_ids
from minprefix.core.gpt2 import GPT2
from minprefix.core.prefix import fingerprint
from minprefix.core.prefix_kv import KVInfix, KVPrefix
from minprefix.formats.prefix_file import save_prefix
from minprefix.methods.files import load_trained, save_trained
from minprefix.system.errors import InputError
from tests.helpers import call
from tests.tiny import write_tiny_bart, write_tiny_model

V, END = 60, 7
SHAPES = {
    "gpt2": {"vocab_size": V, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "bart": {"vocab_size": V, "max_position_embeddings": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
             "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40},
}  # fmt: skip
LENGTHS, OFFSETS = (3, 1, 8, 5), (3, 0, 8, 11)


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return random_model(request.param)


def random_model(kind):
    torch.manual_seed(5)
    model = (GPT2 if kind == "gpt2" else BART)(SHAPES[kind])
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("weight" in name and p.dim() == 1), std=0.3)
    if model.encoder_decoder:
        model.final_logits_bias[:, END] = 4  # some texts end early
    return model.requires_grad_(False).double()


@pytest.fixture(scope="module")
def prefixes(model):
    """Of four lengths and offsets; where the model has several sites, only the first has them all."""
    torch.manual_seed(6)
    sites = set(model.prefix_sites)
    kept = [sites, {"decoder"}, sites - {"cross"}, sites - {"decoder"} or sites]
    return [
        KVPrefix({site: torch.randn(L, 2, H, P, D, dtype=torch.double) * 2
                      for site, (L, H, D) in model.prefix_sites.items() if site in sites}, offset)
        for P, offset, sites in zip(LENGTHS, OFFSETS, kept, strict=True)
    ]  # fmt: skip


def inputs(model, B):
    ids = torch.randint(V, (B, 9), generator=torch.Generator().manual_seed(1))
    if not model.encoder_decoder:
        return (ids,)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 7, 9, 2, 5])[:B, None]
    return ids, ids.flip(1)[:, :6], mask


def test_logits_are_those_of_each_row_alone(model, prefixes):
    rows = [2, 0, 1, 3, 1, 2, 0]
    batch = inputs(model, len(rows))
    together = model(*batch, prefix=stack_prefixes(prefixes, rows))
    for i, row in enumerate(rows):
        alone = model(*(x[i : i + 1] for x in batch), prefix=prefixes[row])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
        other = model(*(x[i : i + 1] for x in batch), prefix=prefixes[row - 1])
        assert (together[i : i + 1] - other).abs().max() > 0.1


def test_gradients_reach_each_prefix_and_no_filling(model, prefixes):
    leaves = [KVPrefix({site: kv.clone().requires_grad_() for site, kv in p.kv.items()}, p.position_offset)
              for p in prefixes[:3]]  # fmt: skip
    rows = [2, 0, 1, 0]
    batch = inputs(model, len(rows))
    model(*batch, prefix=stack_prefixes(leaves, rows)).square().sum().backward()
    together = [{site: kv.grad.clone() for site, kv in p.kv.items()} for p in leaves]
    for kv in (kv for prefix in leaves for kv in prefix.kv.values()):
        kv.grad = None
    for i, row in enumerate(rows):
        model(*(x[i : i + 1] for x in batch), prefix=leaves[row]).square().sum().backward()
    for prefix, grads in zip(leaves, together, strict=True):
        for site, kv in prefix.kv.items():
            torch.testing.assert_close(grads[site], kv.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
def test_64_requests_over_4_prefixes_are_the_single_runs(model, prefixes, beams):
    generator = torch.Generator().manual_seed(2)
    sources = [torch.randint(8, V, (n,), generator=generator).tolist()
               for n in torch.randint(1, 12, (64,), generator=generator).tolist()]  # fmt: skip
    rows = torch.randint(4, (64,), generator=generator).tolist()
    options = {"beams": beams, "max_new_tokens": 10, "batch_size": 13}
    together = generate_ids(model, sources, 2, END, stack_prefixes(prefixes, rows), **options)
    alone = [generate_ids(model, [source], 2, END, prefixes[row], **options)[0]
             for source, row in zip(sources, rows, strict=True)]  # fmt: skip
    assert together == alone
    assert len({len(text) for text in together}) > 1 and len({tuple(text) for text in together}) > 15
    assert together != generate_ids(model, sources, 2, END, prefixes[0], **options)


def test_a_long_source_is_not_refused_for_another_rows_long_prefix(tmp_path):
    model = load_model(write_tiny_model(tmp_path / "gpt2"), dtype=torch.float64)  # 256 positions
    prefixes = [KVPrefix({"decoder": torch.randn(2, 2, 4, P, 8).double()}, P) for P in (100, 5)]
    sources, options = [[7, 8], list(range(170))], {"beams": 2, "max_new_tokens": 9}
    together = generate_ids(model, sources, 2, 4095, stack_prefixes(prefixes, [0, 1]), **options)
    alone = [generate_ids(model, [s], 2, 4095, p, **options)[0] for s, p in zip(sources, prefixes, strict=True)]
    assert together == alone
    with pytest.raises(InputError, match="170 tokens from position 100 on do not fit"):
        generate_ids(model, sources, 2, 4095, stack_prefixes(prefixes, [1, 0]), **options)


def test_one_row_and_one_prefix(model, prefixes):
    batch = inputs(model, 3)
    alone = model(*batch, prefix=prefixes[1])
    for rows in ([1], [1, 1, 1]):  # for the whole batch, for each row
        torch.testing.assert_close(model(*batch, prefix=stack_prefixes(prefixes, rows)), alone, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused(model, prefixes):
    stack = stack_prefixes(prefixes, [0, 1])
    with pytest.raises(InputError, match="3 rows"):
        model(*inputs(model, 3), prefix=stack)
    with pytest.raises(InputError, match="has 2 rows for 3 sources"):
        generate_ids(model, [[8], [9], [10]], 2, END, stack, beams=1)
    for rows in ([0, 4], [-1]):
        with pytest.raises(InputError, match="there are 4"):
            stack_prefixes(prefixes, rows)
    with pytest.raises(InputError, match="there are 0"):
        stack_prefixes([], [0])
    with pytest.raises(InputError, match="an infix cannot be stacked"):
        stack_prefixes([prefixes[0], KVInfix(prefixes[0].kv, 3)], [0, 1])
    other = KVPrefix({"decoder": torch.zeros(9, 2, 1, 4, 5)}, 4)
    with pytest.raises(InputError, match="different models"):
        stack_prefixes([prefixes[0], other], [0, 1])
    too_long = KVPrefix(prefixes[0].kv, 60)
    with pytest.raises(InputError, match="from position 60 on"):
        model(*inputs(model, 2), prefix=stack_prefixes([prefixes[0], too_long], [0, 1]))


# ---- embeddings beside prefixes ----


@pytest.fixture(scope="module")
def gpt2():
    return random_model("gpt2")


@pytest.fixture(scope="module")
def mixed(gpt2, tmp_path_factory):
    """Two embeddings and two prefixes of other lengths and offsets, from files, as sample.py has them."""
    torch.manual_seed(7)
    loaded = []
    for P, offset in zip(LENGTHS, (None, 0, None, 11), strict=True):
        path = tmp_path_factory.mktemp("mixed") / "x.safetensors"
        if offset is None:
            tensors = {"embedding": torch.randn(P, 32) * 2}
            save_trained(path, tensors, fingerprint(gpt2), {"method": "embedding"})
        else:
            prefix = KVPrefix({"decoder": torch.randn(2, 2, 2, P, 16) * 2}, offset)
            save_prefix(path, prefix, gpt2, {})
        loaded.append(load_trained(path, gpt2))
    return loaded


def test_embeddings_and_prefixes_share_a_batch(gpt2, mixed):
    test_logits_are_those_of_each_row_alone(gpt2, mixed)
    torch.manual_seed(7)
    virtual = (torch.randn(LENGTHS[0], 32) * 2).double()  # the first of them, in front of the text by hand
    (ids,) = inputs(gpt2, 1)
    x = torch.cat([virtual, gpt2.wte(ids[0])]) + gpt2.wpe.weight[: LENGTHS[0] + ids.size(1)]
    for block in gpt2.h:
        x = block(x.view(1, -1, 32), causal_mask(x.size(-2), x))
    expected = gpt2.logits(gpt2.ln_f(x))[:, LENGTHS[0] :]
    for rows in ([0], [0, 3], [2, 0, 1]):
        batch = ids.expand(len(rows), -1)
        row = gpt2(batch, prefix=stack_prefixes(mixed, rows))[rows.index(0)]
        torch.testing.assert_close(row[None], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beams", [1, 3])
def test_requests_over_embeddings_and_prefixes_are_the_single_runs(gpt2, mixed, beams):
    test_64_requests_over_4_prefixes_are_the_single_runs(gpt2, mixed, beams)


def test_prefixes_on_several_devices_are_stacked(mixed):
    """What a file holds is loaded on the CPU, what the model makes of an embedding is where the model is."""
    there = KVPrefix({"decoder": mixed[0]["decoder"].to("meta")}, mixed[0].position_offset)  # instead of a GPU
    assert stack_prefixes([there, *mixed[1:]], [0, 1, 2, 3]).kv["decoder"].device.type == "meta"


# ---- sample.py ----


@pytest.fixture(scope="module", params=["gpt2", "bart"])
def world(request, tmp_path_factory):
    """A tiny model; prefixes of three tasks, of which b and c are searched for alike, a otherwise; ten requests."""
    folder = tmp_path_factory.mktemp("world")
    (write_tiny_model if request.param == "gpt2" else write_tiny_bart)(folder / "model")
    model = load_model(folder / "model")
    for name, length, offset, task in (("a", 7, None, "scitldr"), ("b", 2, 0, "e2e"), ("c", 4, None, "rows.jsonl")):
        torch.manual_seed(length)
        prefix = Prefix(model, length, 0, offset).fold()
        save_prefix(folder / f"{name}.safetensors", prefix, model, {"base_model": str(folder / "model"), "task": task})
    (folder / "run").mkdir()
    (folder / "c.safetensors").rename(folder / "run" / "prefix.safetensors")
    sources = {"a": "many   blanks {}", "b": "name[Inn {}], food[Thai]", "run": "item   {}"}
    names = 3 * ("b", "run", "a") + ("b",)
    rows = [{"source": sources[name].format(i), "prefix": name} for i, name in enumerate(names)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, rows


PREFIXES = ("--prefix", "a.safetensors", "--prefix", "b.safetensors", "--prefix", "run")
FEW = ("--max-new-tokens", 12, "--no-repeat-ngram", 1, "--dtype", "float32", "--device", "cpu")


@pytest.mark.parametrize("search", [(), ("--beams", 1)])
def test_sample_writes_each_request_as_it_does_alone(world, capsys, monkeypatch, search):
    folder, rows = world
    monkeypatch.chdir(folder)
    code, out, err = call(sample, capsys, *PREFIXES, "--file", "requests.jsonl", *FEW, *search)
    assert code == 0, err
    texts = out.split("\n")[:-1]
    assert len(texts) == len(rows) and len(set(texts)) > 2  # at least one for each prefix
    for name, path in (("a", "a.safetensors"), ("b", "b.safetensors"), ("run", "run")):
        own = [i for i, row in enumerate(rows) if row["prefix"] == name]
        alone = call(sample, capsys, "--prefix", path, "--input", *(rows[i]["source"] for i in own), *FEW, *search)
        assert alone[1].split("\n")[:-1] == [texts[i] for i in own], name


def test_sample_takes_an_embedding_beside_a_prefix(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, info = load_model(write_tiny_model(tmp_path / "model")), {"base_model": "model", "task": "e2e"}
    torch.manual_seed(8)
    save_prefix("a.safetensors", Prefix(model, 4, 0).fold(), model, info)
    embedding = {"embedding": torch.randn(2, 32) * 3}
    save_trained("embedding.safetensors", embedding, fingerprint(model), {**info, "method": "embedding"})
    rows = [{"source": f"name[Inn {i}]", "prefix": name} for i, name in enumerate(["embedding", "a", "embedding"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = ("--prefix", "a.safetensors", "--prefix", "embedding.safetensors")
    code, out, err = call(sample, capsys, *paths, "--file", "rows.jsonl", *FEW)
    assert code == 0, err
    alone = [call(sample, capsys, "--prefix", f"{row['prefix']}.safetensors", "--input", row["source"], *FEW)[1]
             for row in rows]  # fmt: skip
    assert out == "".join(alone) and len(set(alone)) > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--prefix a.safetensors --prefix a.safetensors --file requests.jsonl", "two --prefix are called 'a'"),
        ("--prefix a.safetensors --prefix b.safetensors --file requests.jsonl",
         "request 2 has \"prefix\": 'run', the prefixes are a, b"),
        ("--prefix a.safetensors --prefix b.safetensors --file other.jsonl", "'pub' is not an E2E meaning"),
        ("--prefix a.safetensors --prefix run --file bare.jsonl", 'request 1 has no "prefix", the prefixes are'),
        ("--prefix a.safetensors --prefix run --input x", "several --prefix need --file FILE.jsonl"),
        ("--prefix a.safetensors --prefix run --file requests.jsonl --evaluate", "unscored"),
        ("--prefix a.safetensors --prefix none --file requests.jsonl", "nothing at none"),
        ("--prefix a.safetensors --prefix top --file requests.jsonl", "of --method top2: only prefixes and embeddings"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(world, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(world[0])
    monkeypatch.setattr(requests, "generate_scored", None)  # is not reached
    other = '{"source": "x", "prefix": "a"}\n{"source": "pub", "prefix": "b"}\n'  # of another task than the first
    (world[0] / "other.jsonl").write_text(other)
    (world[0] / "bare.jsonl").write_text('{"source": "x"}\n')
    (world[0] / "top").mkdir(exist_ok=True)
    save_trained(world[0] / "top" / "top2.safetensors", {}, [], {"method": "top2"})
    code, _, err = call(sample, capsys, *arguments.split())
    assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_a_stack_of_one_row_is_for_all_sources(gpt2):
    prefixes = [KVPrefix({"decoder": torch.randn(2, 2, 2, P, 16)}, P) for P in (2, 3)]
    sources = [[5, 6, 7], [8], [9, 10]]
    for beams in (1, 3):
        texts = [generate_ids(gpt2, sources, 1, 2, stack_prefixes(prefixes, rows), beams=beams, max_new_tokens=4)
                 for rows in ([1], [1, 1, 1])]  # fmt: skip
        assert texts[0] == texts[1]
