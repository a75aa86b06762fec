"""Muon with its matrices in stacks makes the steps of torch's own."""

import pytest
import torch
from torch.optim import Muon

from cfpp_rt.distill.muon import StackedMuon
from tests.closeness import assert_close_max

SHAPES = [(8, 8), (24, 8), (8, 8), (8, 24), (24, 8), (8, 8)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_those_of_torch(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = [kind(x, lr=0.02, weight_decay=weight_decay) for kind, x in ((StackedMuon, ours), (Muon, theirs))]
    for step in range(5):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            # One matrix has no gradient at first: its momentum begins later.
            a.grad = b.grad = None if i == 2 and step < 2 else torch.randn(a.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, x in zip(ours, theirs, start, strict=True):
        # Products of bfloat16 numbers, added up in another order.
        assert_close_max((a - x).detach(), (b - x).detach(), 1e-3)  # of 0.05 to 0.1
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()
    for one, other in zip(ours, theirs, strict=True):
        buffers = (optimizers[i].state[p]["momentum_buffer"] for i, p in enumerate((one, other)))
        torch.testing.assert_close(*buffers)
