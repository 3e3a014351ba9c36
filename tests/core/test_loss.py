"""The loss computed in parts is the loss, and so is its gradient."""

import pytest
import torch
from torch.nn import functional as F

from minprefix import load_model
from minprefix.core.batches import Batch
from minprefix.core.loss import LOGIT_ROWS, target_loss
from tests.tiny import write_tiny_bart, write_tiny_model


@pytest.fixture(scope="module", params=[write_tiny_model, write_tiny_bart])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("model") / "tiny")


def loss_and_gradient(model, states, labels, loss):
    """The loss of the given states, as if a model had made them for a batch."""
    leaf = states.clone().requires_grad_()
    model.hidden_states = lambda *inputs, prefix, segments: leaf[None]
    value = loss(model, Batch((), torch.arange(len(labels)), labels, torch.tensor([1])), None)
    (3 * value).backward()
    return value.detach().double(), leaf.grad.double()


def plain(model, batch, prefix):
    states = model.hidden_states(prefix=prefix, segments=None).flatten(0, 1)[batch.target_positions]
    return F.cross_entropy(model.logits(states).float(), batch.labels, reduction="sum")


@pytest.mark.parametrize(
    "rows", [100, LOGIT_ROWS["cpu"], 2 * LOGIT_ROWS["cpu"] + 7]
)  # the last is large enough to be compiled
def test_in_float32_and_in_bfloat16(folder, rows):
    torch.manual_seed(0)
    states, labels = torch.randn(rows, 32), torch.randint(4096, (rows,))
    exact = loss_and_gradient(load_model(folder), states, labels, plain)
    ours = loss_and_gradient(load_model(folder), states, labels, target_loss)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    model, states = load_model(folder, dtype=torch.bfloat16), states.bfloat16()
    exact = loss_and_gradient(load_model(folder, dtype=torch.bfloat16).float(), states.float(), labels, plain)
    (loss, gradient), (_, rounded) = (loss_and_gradient(model, states, labels, f) for f in (target_loss, plain))
    torch.testing.assert_close(loss, exact[0], rtol=2**-8, atol=0)
    assert (gradient - exact[1]).norm() <= 1.5 * (rounded - exact[1]).norm()


def test_a_head_under_training_gets_its_gradient(folder):
    model = load_model(folder)
    model.head.weight.requires_grad_(True)
    loss_and_gradient(model, torch.randn(5, 32), torch.arange(5), target_loss)
    assert model.head.weight.grad.abs().sum() > 0
