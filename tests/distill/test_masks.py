"""Masks from their definitions, frame by frame, and attention under them against a dense mask."""

import pytest
import torch
import torch.nn.functional as F

from cfpp_rt.distill import masks
from cfpp_rt.errors import InputError


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 3, 5])
def test_teacher_forcing_frame_by_frame(block, window):
    frames = 6
    visible = masks.teacher_forcing(frames, block, window)
    for query in range(frames):
        own = range(query // block * block, query // block * block + block)
        oldest = 0 if window is None else own.stop - window
        clean = {key for key in range(own.stop) if key >= oldest}
        assert set(visible[query].nonzero().flatten().tolist()) == clean
        noisy = {key for key in clean if key < own.start} | {frames + key for key in own}
        if window is None or window >= block:
            assert set(visible[frames + query].nonzero().flatten().tolist()) == noisy


@pytest.mark.parametrize("kind", ["causal", "teacher_forcing"])
@pytest.mark.parametrize(("block", "window"), [(1, None), (1, 3), (3, None), (3, 4)])
@pytest.mark.parametrize("way", [{}, {"dense": True}], ids=["gathered", "dense"])
def test_attention_equals_a_dense_mask(kind, block, window, way):
    visible, tokens = getattr(masks, kind)(6, block, window), 5
    q, k, v = (torch.randn(2, 3, len(visible) * tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dense = visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    ours = masks.attention(visible, tokens, q.device, **way)(q, k, v)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((plain * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("frames", "block"), [(5, 2), (0, 1), (3, 0)])
def test_frames_must_make_whole_blocks(frames, block):
    with pytest.raises(InputError, match="multiple"):
        masks.causal(frames, block)
