import pytest
import torch

from minprefix.core.muon import Muon, newton_schulz


@pytest.mark.parametrize("shape", [(5, 8), (100, 64), (3, 2, 20, 64), (2, 2, 7, 7)])
def test_orthogonal_keeps_the_directions_and_evens_their_lengths(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(newton_schulz(matrices), full_matrices=False)
    assert 0.3 < s.min() and s.max() < 1.3  # from 0.0x to 1 before
    before, _, v = torch.linalg.svd(matrices, full_matrices=False)
    aligned = before @ v  # the nearest matrix with all singular values 1
    assert ((u @ vh) - aligned).abs().max() < 1e-6


def test_zeros_stay_zeros():
    assert torch.equal(newton_schulz(torch.zeros(2, 5, 3)), torch.zeros(2, 5, 3))


def test_a_stack_is_trained_as_torch_trains_each_of_its_matrices():
    torch.manual_seed(0)
    start, target = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    stack = start.clone().requires_grad_()
    singles = [matrix.clone().requires_grad_() for matrix in start.flatten(0, 1)]
    ours = Muon([stack], lr=0.02, weight_decay=0.5)
    # Torch's step is 0.2 sqrt(10) lr long, in bfloat16; its decay is of that lr.
    torchs = torch.optim.Muon(singles, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        (stack - target).pow(2).sum().backward()
        sum((one - t).pow(2).sum() for one, t in zip(singles, target.flatten(0, 1), strict=True)).backward()
        for optimizer in (ours, torchs):
            optimizer.step()
            optimizer.zero_grad()
    assert (stack - start).abs().mean() > 0.05
    assert (stack.flatten(0, 1) - torch.stack(singles)).abs().max() < 0.01
