"""Several targets of a source in one row: loss and gradients are those of its pairs alone, in float64, both models."""

import pytest
import torch

from minprefix import Prefix, load_model, load_tokenizer, stack_prefixes
from minprefix.core import training
from minprefix.core.attention import causal_mask, check_positions, position_ids, visible_keys
from minprefix.core.batches import collate, loss_scale
from minprefix.core.kernels import packed_weights
from minprefix.core.loss import target_loss
from minprefix.core.training import batch_stream, dev_loss, train
from minprefix.methods.baselines import Infix
from minprefix.system.errors import InputError
from tests.helpers import pairs_of, singles
from tests.tiny import write_tiny_bart, write_tiny_model

# Ragged: sources and targets of many lengths, groups of 1 to 4, an empty source for GPT-2.
GROUPS = [
    ([5, 6, 7], [[40, 50, 2], [41, 2], [42, 52, 62, 72, 2]]),
    ([8, 9, 10, 11, 12, 13], [[43, 53, 2]]),
    ([14], [[44, 54, 64, 2], [44, 54, 64, 2], [2], [45, 2]]),
]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module", params=["gpt2", "bart"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / request.param
    return write_tiny_bart(path) if request.param == "bart" else write_tiny_model(path)


@pytest.fixture
def model(folder):
    return load_model(folder, dtype=torch.float64)


def with_empty_source(model):
    return GROUPS if model.encoder_decoder else [*GROUPS, ([], [[46, 2], [47, 57, 2]])]


def loss_and_gradients(model, tokenizer, batches, prefixes, tensors):
    """The summed loss of batches, each with its prefix, and its gradients by the tensors."""
    losses = (target_loss(model, collate(batch, tokenizer, model), prefix)
              for batch, prefix in zip(batches, prefixes, strict=True))  # fmt: skip
    loss = sum(losses)
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def check_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert all(x.abs().max() > 1e-9 for x in ours)


@pytest.mark.parametrize("mlp_width", [0, 8])
@pytest.mark.parametrize("offset", [None, 0])
def test_shared_prefix(model, folder, mlp_width, offset):
    torch.manual_seed(2)
    tokenizer, groups = load_tokenizer(folder), with_empty_source(model)
    prefix = Prefix(model, 3, mlp_width, offset).double()
    tensors = list(prefix.parameters())
    alone = [[pair] for pair in singles(pairs_of(groups))]
    expected = loss_and_gradients(model, tokenizer, alone, [prefix() for _ in alone], tensors)
    check_equal(loss_and_gradients(model, tokenizer, [groups], [prefix()], tensors), expected)
    together = singles(pairs_of(groups))  # a row each, in one batch
    check_equal(loss_and_gradients(model, tokenizer, [together], [prefix()], tensors), expected)


def test_without_a_prefix(model, folder):
    tokenizer, groups = load_tokenizer(folder), with_empty_source(model)
    packed = target_loss(model, collate(groups, tokenizer, model), None)
    alone = sum(target_loss(model, collate([pair], tokenizer, model), None) for pair in singles(pairs_of(groups)))
    torch.testing.assert_close(packed, alone, **EXACT)


def test_a_prefix_for_each_row(model, folder):
    torch.manual_seed(3)
    tokenizer = load_tokenizer(folder)
    prefix = {site: torch.randn(L, 2, len(GROUPS), H, 3, D, dtype=torch.float64, requires_grad=True)
              for site, (L, H, D) in model.prefix_sites.items()}  # fmt: skip
    rows, alone = [], []
    for b, group in enumerate(GROUPS):
        for pair in singles(pairs_of([group])):
            alone.append([pair])
            rows.append({site: kv[:, :, b] for site, kv in prefix.items()})
    tensors = list(prefix.values())
    expected = loss_and_gradients(model, tokenizer, alone, rows, tensors)
    check_equal(loss_and_gradients(model, tokenizer, [GROUPS], [prefix], tensors), expected)


def test_stacked_prefixes_of_other_lengths_and_offsets(model, folder):
    torch.manual_seed(4)
    tokenizer = load_tokenizer(folder)
    prefixes = [Prefix(model, 2, 0).double(), Prefix(model, 5, 0, position_offset=9).double()]
    tensors = [p for prefix in prefixes for p in prefix.parameters()]
    which = [1, 0, 1]
    stacked = stack_prefixes([prefix() for prefix in prefixes], which)
    alone, rows = [], []
    for b, group in enumerate(GROUPS):
        for pair in singles(pairs_of([group])):
            alone.append([pair])
            rows.append(prefixes[which[b]]())
    expected = loss_and_gradients(model, tokenizer, alone, rows, tensors)
    check_equal(loss_and_gradients(model, tokenizer, [GROUPS], [stacked], tensors), expected)


def test_infix(tmp_path):
    torch.manual_seed(5)
    write_tiny_model(tmp_path / "gpt2")
    model, tokenizer = load_model(tmp_path / "gpt2", dtype=torch.float64), load_tokenizer(tmp_path / "gpt2")
    infix, groups = Infix(model, 3, mlp_width=0).double(), with_empty_source(model)
    tensors, alone = list(infix.parameters()), [[pair] for pair in singles(pairs_of(groups))]
    expected = loss_and_gradients(model, tokenizer, alone, [infix() for _ in alone], tensors)
    check_equal(loss_and_gradients(model, tokenizer, [groups], [infix()], tensors), expected)


def test_one_target_a_row_is_computed_as_before(model, folder):
    """The mask and the positions are those of the batch's shape alone, not of its rows."""
    batch = collate(singles(pairs_of(GROUPS)), load_tokenizer(folder), model)
    assert batch.segments is None
    segments = torch.zeros_like(batch.inputs[0]) if not model.encoder_decoder else torch.ones_like(batch.inputs[1])
    kv = Prefix(model, 3, 0).double()()
    states = model.hidden_states(*batch.inputs, prefix=kv)
    assert torch.equal(states, model.hidden_states(*batch.inputs, prefix=kv, segments=segments))


def test_forward_takes_segments(model, folder):
    batch = collate(GROUPS, load_tokenizer(folder), model)
    logits = model(*batch.inputs, segments=batch.segments).flatten(0, 1)[batch.target_positions]
    nats = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    torch.testing.assert_close(nats, target_loss(model, batch, None), **EXACT)


# ---- what a token sees, and where it stands ----


def test_mask_and_positions_by_hand():
    segments = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 2, -1, -1]])
    assert visible_keys(segments).int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]],
    ]
    mask = causal_mask(5, torch.zeros(1, dtype=torch.bfloat16), segments)
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bfloat16
    assert torch.equal(mask[:, 0] == 0, visible_keys(segments)) and bool(((mask == 0) | mask.isinf()).all())
    assert position_ids(segments, 4, 99, segments).tolist() == [[4, 5, 6, 7, 6], [4, 5, 5, 5, 6]]
    starts = torch.tensor([4, 0])
    assert position_ids(segments, starts, 99, segments).tolist() == [[4, 5, 6, 7, 6], [0, 1, 1, 1, 2]]


def test_a_row_may_be_longer_than_the_positions_but_no_pair():
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, -1, -1, -1, -1, -1, -1]])
    positions = position_ids(segments, 3, 7, segments)  # padding's are cut to those that there are
    assert positions.tolist() == [[3, 4, 5, 6, 5, 6, 5, 6], [3, 4, 4, 5, 6, 6, 6, 6]]
    with pytest.raises(InputError, match="4 tokens from position 3 on do not fit the model's 6 positions"):
        check_positions(segments.size(1), 3, 6, segments)


# ---- training ----


def examples(model):
    """Pairs of sources with 1 to 6 references."""
    pairs = [([5 + i, 6, 7 + i][: 1 + i % 3], [40 + i, *[50 + j] * (j % 3 + 1), 4095])
             for i in range(9) for j in range(i % 6 + 1)]  # fmt: skip
    return [([0, *source, 2], [0, *target[:-1], 2]) for source, target in pairs] if model.encoder_decoder else pairs


def trained(folder, out, group, steps=6, **options):
    torch.manual_seed(1)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prefix, pairs = Prefix(model, 3, mlp_width=8), examples(model)
    log, _ = train(model, prefix, tokenizer, pairs, pairs, out, steps=steps, batch_size=8, lr=1e-2, eval_every=2,
                   group=group, **options)  # fmt: skip
    return prefix, log


def test_a_step_averages_over_pairs(model, folder, monkeypatch):
    """For BART over their tokens; in groups or not."""
    gradients = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: gradients.extend(x.grad.clone() for x in p))
    for groups in (GROUPS, singles(pairs_of(GROUPS))):
        torch.manual_seed(1)
        prefix = Prefix(model, 3, mlp_width=0).double()
        optimizer = training.make_optimizer(prefix, 1e-2)
        batch = collate(groups, load_tokenizer(folder), model)
        training.training_step(model, prefix, [batch], optimizer, loss_scale(model, groups))
    for a, b in zip(gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :], strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_log_counts_pairs(folder, tmp_path):
    _, log = trained(folder, tmp_path, group=4)
    assert [row["epoch"] for row in log] == [0, 0.5, 1, 1.5]  # 29 pairs are 4 batches of 8
    assert trained(folder, tmp_path / "one", group=1)[1][0]["dev_loss"] == log[0]["dev_loss"]


def test_a_run_in_groups_is_resumed_bit_for_bit(folder, tmp_path, monkeypatch):
    whole, _ = trained(folder, tmp_path / "whole", group=4)
    step, calls = training.training_step, []

    def step_or_stop(*args):
        if calls.append(args) or len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "training_step", step_or_stop)
        trained(folder, tmp_path / "stopped", group=4)
    resumed, _ = trained(folder, tmp_path / "stopped", group=4, resume=True)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="group = 4, not 1: resume with the same settings"):
        trained(folder, tmp_path / "stopped", group=1, resume=True)


def test_a_run_of_earlier_versions_resumes_with_group_one(folder, tmp_path):
    trained(folder, tmp_path, group=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["settings"]["group"]
    torch.save(state, tmp_path / "checkpoint.pt")
    trained(folder, tmp_path, group=1, resume=True)
    with pytest.raises(InputError, match="group = 1, not 4: resume with the same settings"):
        trained(folder, tmp_path, group=4, resume=True)


def test_stream_of_groups_can_start_anywhere():
    pairs = [([i], [j]) for i in range(7) for j in range(i + 1)]

    def first(start):
        stream = batch_stream(pairs, 8, seed=3, start=start, group=4)
        return [next(stream) for _ in range(12 - start)]

    whole = first(0)
    assert all(first(start) == whole[start:] for start in range(12))
    assert sorted(sum(map(pairs_of, whole[:4]), [])) == sorted(pairs) == sorted(sum(map(pairs_of, whole[4:8]), []))


def test_dev_loss_reads_a_source_once(model, folder, monkeypatch):
    tokenizer, pairs = load_tokenizer(folder), examples(model)
    prefix = Prefix(model, 3, 0).double()()
    rows = []
    monkeypatch.setattr(training, "collate", lambda groups, *rest: rows.extend(groups) or collate(groups, *rest))
    loss = dev_loss(model, lambda: prefix, pairs, tokenizer, 8)
    assert len(rows) == 9 < len(pairs)
    alone = sum(target_loss(model, collate([pair], tokenizer, model), prefix) for pair in singles(pairs)).item()
    assert loss == pytest.approx(alone / sum(len(target) for _, target in pairs), rel=1e-12)


def test_packed_products_and_bfloat16(folder):
    """As train.py runs on a CPU: the loss of a group is near that of its pairs in bfloat16."""
    model, tokenizer = load_model(folder, dtype=torch.bfloat16), load_tokenizer(folder)
    kv = Prefix(model, 3, 0)()
    with packed_weights(model, training=True):
        packed = target_loss(model, collate(GROUPS, tokenizer, model), kv)
        alone = target_loss(model, collate(singles(pairs_of(GROUPS)), tokenizer, model), kv)
    torch.testing.assert_close(packed, alone, rtol=1e-2, atol=0)
