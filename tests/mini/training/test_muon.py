import copy

import pytest
import torch

from mini.training.muon import Muon, orthogonalized


def parameters():
    torch.manual_seed(0)
    shapes = ((24, 24), (24, 24), (64, 24), (24, 64))
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_it_steps_as_torchs_muon_does():
    ours, theirs = parameters(), parameters()
    mine = Muon(ours, lr=1e-2, weight_decay=0.02)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
    before = parameters()
    for one, other, start in zip(ours, theirs, before, strict=True):
        # torch's iterates in BF16
        assert (one - other).norm() < 0.02 * (other - start).norm()


def test_its_state_is_saved_and_restored():
    def trained(optimizer, values, seed):
        torch.manual_seed(seed)
        for value in values:
            value.grad = torch.randn_like(value)
        optimizer.step()

    values = parameters()
    optimizer = Muon(values, lr=1e-2, weight_decay=0.0)
    trained(optimizer, values, 1)
    others = [torch.nn.Parameter(value.detach().clone()) for value in values]
    restored = Muon(others, lr=5.0, weight_decay=0.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(optimizer, values, 2)
    trained(restored, others, 2)
    for value, other in zip(values, others, strict=True):
        torch.testing.assert_close(other, value)
