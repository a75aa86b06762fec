"""bfloat16 over float32 masters: the arithmetic of cast parameters, and small updates that are not lost."""

import copy

import pytest
import torch
from torch.func import functional_call

from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill import checkpoint
from cfpp_rt.distill.ar_diffusion import ArDiffusion
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.forward import Condition, Denoiser, Layout
from cfpp_rt.distill.precision import MasterWeights
from cfpp_rt.distill.settings import StageSettings
from cfpp_rt.distill.train import Trainer
from tests.distill.tiny import tiny_model


class Pass(torch.nn.Module):
    """A loss of the network as a module, for `functional_call`."""

    def __init__(self, network, latents, timesteps):
        super().__init__()
        self.network, self.latents, self.timesteps = network, latents, timesteps

    def forward(self):
        clean, noisy = self.latents
        condition = Condition(torch.zeros(len(clean), 0, 1))
        return Denoiser(self.network).teacher_forced(clean, noisy, self.timesteps, condition).square().mean()


def test_gradients_are_those_of_parameters_cast_within_the_graph():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 2, 3, 16, 4, 4, generator=generator).unbind()
    network = tiny_model().requires_grad_(True)
    run = Pass(network, latents, torch.rand(2, 3, generator=generator) * 1000)
    functional_call(run, {name: p.bfloat16() for name, p in run.named_parameters()}, ()).backward()
    wanted = {name: p.grad for name, p in network.named_parameters()}
    master = MasterWeights(copy.deepcopy(network), torch.bfloat16)
    master.module.zero_grad()
    run.network = master.network
    run().backward()
    master.take_gradients()
    for name, parameter in master.module.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.equal(parameter.grad, wanted[name]), name
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in master.network.parameters())


def trainer_of(folder, dtype, steps=30, **settings):
    student, ema = tiny_model().requires_grad_(True), tiny_model()
    stage = ArDiffusion(Denoiser(student, Layout(1, 2)), ema, schedule=FlowMatchSchedule(5.0))
    clip = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    own = StageSettings(steps=steps, save_every=10, keep=9, **settings)
    batch = Batch(Condition(torch.zeros(2, 0, 1)), clip)
    return Trainer("ar", stage, own, lambda position: batch, folder, dtype=dtype)


def test_updates_too_small_for_bfloat16_add_up_in_the_masters(tmp_path):
    trainer = trainer_of(tmp_path, torch.bfloat16, lr=2e-6)  # the published rate: far less than half a step of most
    before = copy.deepcopy(trainer.masters["student"].module)
    trainer.run(lambda text: None)
    weights = [(p, q) for p, q in zip(before.parameters(), trainer.masters["student"].module.parameters(), strict=True)]
    moved = torch.cat([(q - p).abs().flatten() for p, q in weights])
    rounded = torch.cat([((p + (q - p) / 30).bfloat16() != p.bfloat16()).flatten() for p, q in weights])
    assert moved.dtype == torch.float32 and (moved > 1e-6).float().mean() > 0.9
    assert rounded.float().mean() < 0.1  # a step of bfloat16 parameters would have changed none of the others
    used = dict(trainer.stage.trained["student"].named_parameters())
    for name, kept in trainer.masters["student"].module.named_parameters():
        assert torch.equal(used[name], kept.bfloat16())


def test_bfloat16_learns_as_float32_does(tmp_path):
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = trainer_of(tmp_path / str(dtype)[6:], dtype, lr=3e-3)
        losses[dtype] = [trainer._one_step()["student_loss"] for _ in range(30)]
    low, high = losses[torch.bfloat16], losses[torch.float32]
    assert high[0] > 1.3 * sum(high[-5:]) / 5
    assert sum(low[-5:]) == pytest.approx(sum(high[-5:]), rel=0.05)


def test_a_resumed_bfloat16_run_is_bit_equal(tmp_path):
    whole = trainer_of(tmp_path / "whole", torch.bfloat16, steps=20, lr=1e-3)
    whole.run(lambda text: None)
    (tmp_path / "parts").mkdir()
    checkpoint.path_of(tmp_path / "whole", 10).rename(checkpoint.path_of(tmp_path / "parts", 10))
    parts = trainer_of(tmp_path / "parts", torch.bfloat16, steps=20, lr=1e-3)
    parts.resume()
    assert parts.step == 10
    parts.run(lambda text: None)
    for one, other in ((whole.masters["student"], parts.masters["student"]), (whole.ema, parts.ema)):
        for p, q in zip(one.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(p, q)
    saved = checkpoint.load(checkpoint.path_of(tmp_path / "parts", 20))
    assert {t.dtype for t in saved["networks"]["student"].values()} == {torch.float32}
