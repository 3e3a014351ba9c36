"""Sequences read as the paper says, batches hold each row once, and no padding is in the loss; for both models."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minprefix import load_tokenizer
from minprefix.core.attention import length_mask
from minprefix.core.batches import Batch, collate, cut_groups, epoch_batches, eval_batches, group_sizes, pairs_by_source
from minprefix.core.encode import encode_pairs, encode_sources, encode_target, pair_lengths, sequence_form, start_id
from minprefix.data.pairs import load_pairs
from minprefix.data.tasks import Example, load_e2e
from minprefix.formats.tokenizer import Tokenizer, byte_alphabet
from tests.helpers import complaint, pairs_of, singles
from tests.tiny import ROOT

MINI = ROOT / "weights" / "gpt2-mini"


def gpt2(n_positions=1024):
    """What this module sees of a GPT-2 ..."""
    return SimpleNamespace(encoder_decoder=False, n_positions=n_positions, config={})


def bart(n_positions=1024, start=2):
    """... and of a BART."""
    config = {"decoder_start_token_id": start}
    return SimpleNamespace(encoder_decoder=True, n_positions=n_positions, config=config)


@pytest.fixture(scope="module")
def tiny():
    """Bytes and one merge, so that ids can be written down: " a" is 256, "<|endoftext|>" 257, a blank 220."""
    vocab = {character: i for i, character in enumerate(byte_alphabet())}
    return Tokenizer({**vocab, "Ġa": 256, "<|endoftext|>": 257}, [("Ġ", "a")])


@pytest.fixture(scope="module")
def tiny_bart():
    """Likewise, the special tokens where BART has them: "a" is 68, a blank 224, " a" 260."""
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocab = {character: i for i, character in enumerate(byte_alphabet(), len(special))}
    return Tokenizer({**special, **vocab, "Ġa": 260, "<mask>": 261}, [("Ġ", "a")])


# ---- examples -> token ids ----


def test_exact_ids(tiny):
    a, b, c, blank, end = 256, 65, 66, 220, 257
    examples = [Example("a", ["b", "c a"]), Example("unlabelled", []), Example("b", ["a"])]
    pairs = encode_pairs(examples, tiny, gpt2())
    assert pairs == [
        ([a, blank], [blank, b, blank, end]),
        ([a, blank], [blank, c, a, blank, end]),
        ([blank, b, blank], [a, blank, end]),
    ]
    assert encode_sources(["a"], tiny, gpt2()) == [[a, blank]]
    assert encode_target("b", tiny, gpt2()) == [blank, b, blank, end]
    assert start_id(gpt2(), tiny) == end
    assert pair_lengths(pairs) == [6, 7, 6]

    batch = collate(singles(pairs), SimpleNamespace(end_id=end, pad_id=999), gpt2())
    assert len(batch.inputs) == 1 and batch.inputs[0].tolist() == [
        [a, blank, end, blank, b, blank, 999],
        [a, blank, end, blank, c, a, blank],
        [blank, b, blank, end, a, blank, 999],
    ]
    assert batch.target_positions.tolist() == [2, 3, 4, 5, 9, 10, 11, 12, 13, 17, 18, 19]
    assert batch.labels.tolist() == [blank, b, blank, end, blank, c, a, blank, end, a, blank, end]


@pytest.mark.parametrize("start", [2, 0])
def test_exact_ids_of_an_encoder_decoder(tiny_bart, start):
    """No blank around the texts; the decoder starts from what config.json says, and predicts <s> and </s>."""
    model = bart(start=start)
    a, _a, b, c, s, pad, end = 68, 260, 69, 70, 0, 1, 2
    examples = [Example("a", ["b", "c a"]), Example("unlabelled", []), Example("b a", ["a"]), Example("", [""])]
    pairs = encode_pairs(examples, tiny_bart, model)
    assert pairs == [
        ([s, a, end], [s, b, end]),
        ([s, a, end], [s, c, _a, end]),
        ([s, b, _a, end], [s, a, end]),
        ([s, end], [s, end]),
    ]
    assert encode_sources(["a"], tiny_bart, model) == [[s, a, end]]
    assert encode_target("c a", tiny_bart, model) == [s, c, _a, end]
    assert start_id(model, tiny_bart) == start
    assert pair_lengths(pairs) == [6, 7, 7, 4]

    batch = collate(singles(pairs), tiny_bart, model)
    source_ids, target_ids, source_mask = batch.inputs
    assert source_ids.tolist() == [[s, a, end, pad], [s, a, end, pad], [s, b, _a, end], [s, end, pad, pad]]
    assert target_ids.tolist() == [[start, s, b, pad], [start, s, c, _a], [start, s, a, pad], [start, s, pad, pad]]
    assert source_mask.dtype == torch.bool
    assert source_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.target_positions.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13]
    assert batch.labels.tolist() == [s, b, end, s, c, _a, end, s, a, end, s, end]


def test_the_sequence_reads_as_in_the_paper():
    tokenizer, model = load_tokenizer(MINI), gpt2()
    examples = load_e2e("dev", None)[:20]
    pairs = encode_pairs(examples, tokenizer, model)
    texts = [(example.source, y) for example in examples for y in example.references]
    assert len(pairs) == len(texts) == 60
    batch = collate(singles(pairs), tokenizer, model)
    (ids,) = batch.inputs
    T = ids.size(1)
    for b, ((source, _), (x, y)) in enumerate(zip(pairs, texts, strict=True)):
        assert [source] == encode_sources([x], tokenizer, model)
        here = (batch.target_positions >= b * T) & (batch.target_positions < (b + 1) * T)
        labels, begin = batch.labels[here].tolist(), int(batch.target_positions[here][0]) - b * T
        seen = ids[b, : begin + len(labels)].tolist() + labels[-1:]  # what is read, and the last prediction
        assert tokenizer.decode(seen) == f" {x} <|endoftext|> {y} <|endoftext|>"
        assert sequence_form(model).format(x=x, y=y) == tokenizer.decode(seen)
        assert tokenizer.decode(labels) == f" {y} <|endoftext|>" and labels[-1] == tokenizer.end_id


def test_what_an_encoder_decoder_reads_and_writes(tiny_bart):
    x, y = 'Ein Satz, noch einer:\n"é 中 😀"', "a  b"
    ((source, target),) = encode_pairs([Example(x, [y])], tiny_bart, bart())
    form = f"{tiny_bart.decode(source)} -> {tiny_bart.decode(target)}"
    assert form == sequence_form(bart()).format(x=x, y=y) == f"<s>{x}</s> -> <s>{y}</s>"


def test_special_tokens_in_a_text_are_characters(tiny_bart):
    tokenizer = load_tokenizer(MINI)
    examples = [Example("a <|endoftext|> b", ["<|endoftext|>"])]
    ((source, target),) = encode_pairs(examples, tokenizer, gpt2())
    assert tokenizer.end_id not in source + target[:-1] and target[-1] == tokenizer.end_id
    ((source, target),) = encode_pairs([Example("</s> <s><mask>", ["<pad></s>"])], tiny_bart, bart())
    for ids in (source, target):
        assert (ids[0], ids[-1]) == (0, 2) and not {0, 1, 2, 3, 261} & set(ids[1:-1])


# ---- how long sources may be ----


def letters(n):
    return "b" * n


def test_a_source_is_cut_and_keeps_its_special_tokens(tiny_bart, capsys):
    """The first tokens stay, and it is said in one line, with a count."""
    b, c, s, end = 69, 70, 0, 2
    texts = ["bc" * 4, letters(5), letters(6), ""]
    sources = encode_sources(texts, tiny_bart, bart(), 7)
    assert sources == [[s, b, c, b, c, b, end], [s, *[b] * 5, end], [s, *[b] * 5, end], [s, end]]
    assert capsys.readouterr().err == "cut 2 of 4 sources to their first 7 tokens\n"
    pairs = encode_pairs([Example(text, [letters(50), "c"]) for text in texts], tiny_bart, bart(), 7, "dev sources")
    assert [source for source, _ in pairs] == [source for source in sources for _ in range(2)]
    assert {len(target) for _, target in pairs} == {52, 3}  # targets are not cut
    assert capsys.readouterr().err == "cut 2 of 4 dev sources to their first 7 tokens\n"
    encode_sources(texts[:1] * 1234, tiny_bart, bart(), 7)
    assert capsys.readouterr().err == "cut 1,234 of 1,234 sources to their first 7 tokens\n"


def test_sources_that_fit_are_left_alone(tiny_bart, tiny, capsys):
    assert encode_sources([letters(5)], tiny_bart, bart(), 7) == encode_sources([letters(5)], tiny_bart, bart())
    assert encode_sources(["a"], tiny, gpt2(), 2) == encode_sources(["a"], tiny, gpt2())
    assert encode_sources([], tiny_bart, bart(), 7) == encode_pairs([], tiny_bart, bart()) == []
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("n_positions, most", [(1024, 512), (512, 512), (511, 511), (20, 20), (3, 3)])
def test_an_encoder_reads_512_tokens_or_as_many_as_it_can(tiny_bart, capsys, n_positions, most):
    sources = encode_sources([letters(10_000), letters(most - 2)], tiny_bart, bart(n_positions))
    assert sources == [[0, *[69] * (most - 2), 2]] * 2
    assert capsys.readouterr().err == f"cut 1 of 2 sources to their first {most} tokens\n"


def test_max_source_may_be_more_than_the_default(tiny_bart, capsys):
    [source] = encode_sources([letters(10_000)], tiny_bart, bart(), 1024)
    assert len(source) == 1024 and (source[0], source[-1]) == (0, 2)
    assert "to their first 1024 tokens" in capsys.readouterr().err


def test_gpt2_sources_are_cut_on_request_only(tiny, capsys):
    a, blank = 256, 220
    text = "a " * 10_000 + "a"
    assert encode_sources([text], tiny, gpt2(64)) == [[*[a] * 10_001, blank]]
    assert capsys.readouterr().err == ""
    assert encode_sources([text, "a"], tiny, gpt2(64), 3) == [[a, a, a], [a, blank]]
    assert capsys.readouterr().err == "cut 1 of 2 sources to their first 3 tokens\n"
    assert encode_pairs([Example(text, ["a a"])], tiny, gpt2(64), 1) == [([a], [a, a, blank, 257])]


def test_a_cut_that_leaves_no_text(tiny, tiny_bart):
    for most in (-5, 0, 1, 2):
        message = complaint(encode_sources, [letters(9)], tiny_bart, bart(), most)
        assert f"at most {most} tokens" in message and "--max-source to 3 or more" in message
        complaint(encode_pairs, [Example("b", ["b"])], tiny_bart, bart(), most)
    assert encode_sources([letters(9)], tiny_bart, bart(), 3) == [[0, 69, 2]]
    for most in (-1, 0):
        assert "no room for text: raise --max-source to 1" in complaint(encode_sources, ["a"], tiny, gpt2(), most)
    assert "at most 2 tokens" in complaint(encode_sources, ["b"], tiny_bart, bart(n_positions=2))


# ---- ids -> batches ----


def random_pairs(rng):
    sizes = rng.integers(1, 30, (rng.integers(1, 9), 2))
    return [(rng.integers(0, 50, s).tolist(), rng.integers(0, 50, t).tolist()) for s, t in sizes]


def check_labels(batch, ids, pairs, before):
    """The labels are the targets; those of row b are predicted from before[b] on, where the row has start token 50."""
    B, T = ids.shape
    inputs, at = ids.reshape(-1), 0
    for b, (_, target) in enumerate(pairs):
        row, begin = ids[b].tolist(), before[b]
        assert row[begin] == 50
        index = batch.target_positions[at : at + len(target)].tolist()
        assert batch.labels[at : at + len(target)].tolist() == target
        assert index == list(range(b * T + begin, b * T + begin + len(target)))
        # every label but the last is the next input of its row; after the last one there is only padding
        assert [int(inputs[i + 1]) for i in index[:-1]] == target[:-1]
        assert set(row[index[-1] - b * T + 1 :]) <= {51}
        at += len(target)
    assert at == len(batch.labels) == len(batch.target_positions)
    assert 51 not in inputs[batch.target_positions] and 51 not in batch.labels
    assert batch.target_positions.dtype == batch.labels.dtype == torch.int64 and len(batch.source_lengths) == B == len(
        pairs
    )


SPECIAL = SimpleNamespace(end_id=50, pad_id=51)


def test_collate_properties():
    rng = np.random.default_rng(1)
    for _ in range(200):
        pairs = random_pairs(rng)
        before = json.dumps(pairs)
        batch = collate(singles(pairs), SPECIAL, gpt2())
        (ids,) = batch.inputs
        assert ids.dtype == torch.int64 and ids.shape == (len(pairs), max(len(s) + len(t) for s, t in pairs))
        assert int((ids != 51).sum()) == sum(pair_lengths(pairs))
        for row, (source, _) in zip(ids.tolist(), pairs, strict=True):
            assert row[: len(source)] == source
        check_labels(batch, ids, pairs, [len(source) for source, _ in pairs])
        assert json.dumps(pairs) == before


def test_collate_properties_of_an_encoder_decoder():
    rng = np.random.default_rng(2)
    for _ in range(200):
        pairs = random_pairs(rng)
        before = json.dumps(pairs)
        batch = collate(singles(pairs), SPECIAL, bart(start=50))
        source_ids, target_ids, mask = batch.inputs
        assert source_ids.dtype == target_ids.dtype == torch.int64 and mask.dtype == torch.bool
        assert source_ids.shape == mask.shape == (len(pairs), max(len(s) for s, _ in pairs))
        assert target_ids.shape == (len(pairs), max(len(t) for _, t in pairs))
        assert torch.equal(mask, source_ids != 51)
        assert torch.equal(mask, length_mask(torch.tensor([len(s) for s, _ in pairs]), source_ids.size(1)))
        assert int(mask.sum() + (target_ids != 51).sum()) == sum(pair_lengths(pairs))
        for row, real, (source, _) in zip(source_ids, mask, pairs, strict=True):
            assert row[real].tolist() == source
        check_labels(batch, target_ids, pairs, [0] * len(pairs))
        assert json.dumps(pairs) == before


@pytest.mark.parametrize("model", [gpt2(), bart(start=50)], ids=["gpt2", "bart"])
def test_a_batch_shares_no_memory(model):
    """Not with the pairs, not among its tensors, not with another batch: all may be changed in place."""
    pairs = [([1, 2], [3, 4]), ([5, 6], [7, 8])]
    batch, other = (collate(singles(pairs), SPECIAL, model) for _ in range(2))
    tensors = [*batch.inputs, batch.target_positions, batch.labels]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)
    for x in tensors:
        x.zero_()
    again = collate(singles(pairs), SPECIAL, model)
    assert pairs == [([1, 2], [3, 4]), ([5, 6], [7, 8])]
    tensors = ([*batch.inputs, batch.target_positions, batch.labels] for batch in (other, again))
    for one, two in zip(*tensors, strict=True):
        assert torch.equal(one, two)


def test_collate_when_padding_is_the_end_token(tiny):
    pairs = encode_pairs([Example("a", ["b"]), Example("a a a", ["c c c"])], tiny, gpt2())
    batch = collate(singles(pairs), tiny, gpt2())
    assert tiny.end_id == tiny.pad_id
    assert batch.labels.tolist() == pairs[0][1] + pairs[1][1]


def test_collate_when_a_text_has_the_padding_id():
    """The mask goes by lengths, not by ids."""
    pairs = [([1, 51, 51], [2]), ([1, 2, 3, 4], [51, 3])]
    source_ids, target_ids, mask = collate(singles(pairs), SPECIAL, bart(start=51)).inputs
    assert source_ids.tolist() == [[1, 51, 51, 51], [1, 2, 3, 4]] and target_ids.tolist() == [[51, 51], [51, 51]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("model", [gpt2(), bart()], ids=["gpt2", "bart"])
def test_batch_to_device(model):
    batch = collate(singles([([1, 2], [3, 4, 5])]), SPECIAL, model)
    moved = batch.to("meta")
    tensors = [*moved.inputs, moved.target_positions, moved.labels]
    assert isinstance(moved, Batch) and {x.device for x in tensors} == {torch.device("meta")}
    assert [x.shape for x in moved.inputs] == [x.shape for x in batch.inputs]
    assert len(moved.source_lengths) == 1 and batch.inputs[0].device.type == "cpu"


def numbered_pairs(lengths):
    """A pair for each length: its source is its number, its target makes up for the rest."""
    return [([i], [0] * (int(length) - 1)) for i, length in enumerate(lengths)]


def numbers(groups):
    return [source[0] for source, _ in pairs_of(groups)]


def batches_of_pairs(lengths, size, seed, epoch):
    return [numbers(batch) for batch in epoch_batches(singles(numbered_pairs(lengths)), size, seed, epoch)]


def test_epoch_batches_properties():
    rng = np.random.default_rng(2)
    for trial in range(200):
        n, size = int(rng.integers(0, 700)), int(rng.integers(1, 20))
        lengths = rng.integers(2, 40, n)
        groups = singles(numbered_pairs(lengths))
        both = epoch_batches(groups, size, trial, 3, encoder_decoder=True)
        assert sorted(i for batch in both for i in numbers(batch)) == list(range(n))
        batches = batches_of_pairs(lengths, size, trial, 3)
        assert sorted(i for batch in batches for i in batch) == list(range(n))
        assert len(batches) == -(-n // size)
        assert sum(len(batch) != size for batch in batches) == (n % size > 0)
        assert batches == batches_of_pairs(lengths, size, trial, 3)
        in_order = [numbers(batch) for batch in eval_batches(numbered_pairs(lengths), size)]
        assert [i for batch in in_order for i in batch] == sorted(range(n), key=lambda i: -lengths[i])
        assert [len(batch) for batch in in_order] == [size] * (n // size) + [n % size] * (n % size > 0)


def test_batches_of_one_target_are_those_of_earlier_versions():
    """So that a run that was begun then goes on with the same batches, and recorded tables stay comparable."""
    rng = np.random.default_rng(5)
    pairs = [([i, *[1] * rng.integers(30)], [2] * rng.integers(1, 20)) for i in range(333)]
    for encoder_decoder, digest in ((False, "9afee377f500bc01"), (True, "028f55464ebd357a")):
        batches = epoch_batches(singles(pairs), 8, 101, 2, encoder_decoder)
        text = json.dumps([numbers(batch) for batch in batches])
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_epochs_and_seeds_differ_and_the_global_seed_does_not_matter():
    lengths = np.random.default_rng(3).integers(5, 60, 100)
    runs = [batches_of_pairs(lengths, 10, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (0, 1), (2, 0))]
    members = [{frozenset(batch) for batch in run} for run in runs]
    for i in range(4):
        for j in range(i):
            assert runs[i] != runs[j]
            assert len(members[i] & members[j]) <= 2  # other batches, not only another order of the same
    np.random.seed(0)
    assert batches_of_pairs(lengths, 10, 1, 0) == runs[0]


def test_buckets_save_padding_and_come_in_any_order():
    rng = np.random.default_rng(4)
    lengths = rng.integers(10, 100, 10_000)

    def computed(batches):
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    batches = batches_of_pairs(lengths, 10, 0, 0)
    assert computed(batches) < 1.05 * lengths.sum() < 1.3 * lengths.sum() < computed(np.split(np.arange(10_000), 1000))
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(1000))[0, 1]) < 0.15
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.15


# ---- several targets of a source in a row ----


def referenced_pairs(rng, sources, most=12):
    """Sources with 1 to `most` references of random lengths, in no order; a source's number is its first token."""
    pairs = [([i, *[7] * (i % 5)], [count, *[8] * rng.integers(6)])
             for i in range(sources) for count in range(rng.integers(1, most + 1))]  # fmt: skip
    return [pairs[i] for i in rng.permutation(len(pairs))]


def test_group_sizes_divide_the_batch():
    assert group_sizes(16, 4) == group_sizes(16, 7) == [4, 2, 1] and group_sizes(16, 8) == [8, 4, 2, 1]
    assert group_sizes(12, 6) == [6, 4, 3, 2, 1] and group_sizes(5, 9) == [5, 1] and group_sizes(7, 4) == [1]


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_every_pair_is_in_one_group_of_an_epoch(encoder_decoder):
    rng = np.random.default_rng(6)
    for trial in range(100):
        pairs, size, group = referenced_pairs(rng, int(rng.integers(1, 60))), *map(int, rng.integers(1, 20, 2))
        sizes = group_sizes(size, group)
        groups = cut_groups(pairs_by_source(pairs), sizes, trial, 1)
        assert sorted(pairs_of(groups)) == sorted(pairs)
        assert {len(targets) for _, targets in groups} <= set(sizes)
        batches = epoch_batches(groups, size, trial, 1, encoder_decoder)
        assert sorted(sum(map(pairs_of, batches), [])) == sorted(pairs)
        assert len(batches) == -(-len(pairs) // size)
        assert sorted((len(pairs_of(batch)) for batch in batches), reverse=True) == [size] * (len(pairs) // size) + [
            len(pairs) % size
        ] * (len(pairs) % size > 0)
        assert max(len(targets) for batch in batches for _, targets in batch) <= group
        mixed = sum(len({len(targets) for _, targets in batch}) > 1 for batch in batches)
        assert mixed <= len(sizes)  # only what is left over of each size
        assert batches == epoch_batches(cut_groups(pairs_by_source(pairs), sizes, trial, 1), size, trial, 1,
                                        encoder_decoder)  # fmt: skip


def test_other_targets_share_a_row_in_another_epoch():
    pairs = [([1], [i, 0]) for i in range(40)]
    groups = [cut_groups(pairs_by_source(pairs), [4, 2, 1], seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    rows = [{frozenset(target[0] for target in targets) for _, targets in epoch} for epoch in groups]
    assert all(len(row) == 10 for row in rows)
    assert len(rows[0] & rows[1]) <= 1 and len(rows[0] & rows[2]) <= 1


def test_groups_of_one_size_save_padding_too():
    rng = np.random.default_rng(7)
    pairs = [([i, *[7] * rng.integers(10, 40)], [8] * rng.integers(10, 40)) for i in range(1500)]
    pairs = [(source, [*target, i]) for source, target in pairs for i in range(rng.integers(1, 12))]
    groups = cut_groups(pairs_by_source(pairs), group_sizes(16, 8), 0, 0)
    lengths = [[len(source) + sum(map(len, targets)) for source, targets in batch]
               for batch in epoch_batches(groups, 16, 0, 0)]  # fmt: skip
    assert sum(len(row) * max(row) for row in lengths) < 1.05 * sum(map(sum, lengths))


def test_evaluation_reads_a_source_once_for_eight_targets():
    pairs = referenced_pairs(np.random.default_rng(8), 50, most=30)
    for size in (1, 5, 16):
        batches = eval_batches(pairs, size)
        assert sorted(sum(map(pairs_of, batches), [])) == sorted(pairs)
        rows = [len(targets) for batch in batches for _, targets in batch]
        assert len(rows) == sum(-(-len(same) // 8) for same in pairs_by_source(pairs)) and max(rows) == 8
        assert all(len(pairs_of(batch)) <= size or len(batch) == 1 for batch in batches)


def test_exact_ids_of_a_group():
    groups = [([1, 2], [[3, 50], [4, 5, 50]]), ([6], [[7, 50]])]
    batch = collate(groups, SPECIAL, gpt2())
    assert batch.inputs[0].tolist() == [[1, 2, 50, 3, 50, 4, 5], [6, 50, 7, 51, 51, 51, 51]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, -1, -1, -1, -1]]
    assert batch.target_positions.tolist() == [2, 3, 4, 5, 6, 8, 9]
    assert batch.labels.tolist() == [3, 50, 4, 5, 50, 7, 50]
    assert batch.source_lengths.tolist() == [2, 1]

    batch = collate(groups, SPECIAL, bart(start=9))
    source_ids, target_ids, mask = batch.inputs
    assert source_ids.tolist() == [[1, 2], [6, 51]] and mask.tolist() == [[1, 1], [1, 0]]
    assert target_ids.tolist() == [[9, 3, 9, 4, 5], [9, 7, 51, 51, 51]]
    assert batch.segments.tolist() == [[1, 1, 2, 2, 2], [1, 1, -1, -1, -1]]
    assert batch.target_positions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.labels.tolist() == [3, 50, 4, 5, 50, 7, 50]


def test_low_data_makes_do_with_the_dev_pairs_that_there_are(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"source": f"s{i}", "target": f"t{i}"}) + "\n" for i in range(200)))
    tokenizer, model = load_tokenizer(MINI), gpt2()
    sizes = [len(load_pairs(str(path), split, tokenizer, model, 0, low_data=count))
             for split, count in (("train", 100), ("dev", 60), ("dev", 100))]  # fmt: skip
    assert sizes == [100, 18, 20]
    assert capsys.readouterr().err == f"{path}, dev split has 20 pairs, not the 30 of --low-data 100: all are taken\n"
    assert "181 cannot be drawn" in complaint(lambda: load_pairs(str(path), "train", tokenizer, model, 0, low_data=181))
