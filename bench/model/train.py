"""Time a training step of the trainer, and of a plain PyTorch loop of the same model.

Complete steps of stage ar: batch, loss, backward pass, clipping, AdamW, moving average. `cfpp` is the trainer; `plain`
is the loop of `plain_training` with the same weights, random numbers and optimiser, and attention over a dense mask.
Both are timed interleaved in one run, after a check that their losses agree. With --dtype bfloat16 the trainer computes
in bfloat16 over float32 master weights, and the loop runs under torch.autocast.

    python -m cfpp_rt.bench.model.train [--device cpu] [--dtype float32] [--rounds 10] [--json PATH]
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.bench import harness
from cfpp_rt.bench.model.plain_training import teacher_forced, token_mask
from cfpp_rt.config import ModelConfig
from cfpp_rt.core.schedule import TABLE_SIZE, FlowMatchSchedule
from cfpp_rt.distill import masks
from cfpp_rt.distill.ar_diffusion import ArDiffusion
from cfpp_rt.distill.assemble import fresh_model
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.forward import Condition, Denoiser, Layout
from cfpp_rt.distill.rng import block_indices, normal_like
from cfpp_rt.distill.settings import StageSettings
from cfpp_rt.distill.train import Trainer
from cfpp_rt.errors import InputError
from cfpp_rt.values import DTYPES


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the shape of a clip's latents: [batch, frames, 16, height, width]."""

    name: str
    config: ModelConfig
    batch: int
    frames: int
    height: int
    width: int
    layout: Layout


CASES = (
    Case(
        "world",  # sizes of configs/world.yaml, without actions
        ModelConfig(
            dim=128, ffn_dim=512, num_heads=2, num_layers=4, freq_dim=64, text_dim=1, text_len=0, patch_size=(1, 1, 1)
        ),
        4,
        8,
        6,
        6,
        Layout(1, 3),
    ),
    Case(
        "wan-small",  # blocks like Wan's, small frames, no window
        ModelConfig(dim=384, ffn_dim=2240, num_heads=3, num_layers=2, freq_dim=256, text_dim=256, text_len=128),
        1,
        9,
        12,
        16,
        Layout(1, None),
    ),
)
_SCHEDULE = FlowMatchSchedule(5.0)


def settings() -> StageSettings:
    return StageSettings(steps=10**9, batch=1, lr=1e-4, betas=(0.0, 0.999), clip=10.0, ema=0.99, save_every=10**9)


def trainer(
    case: Case, model: nn.Module, batch: Batch, dtype: torch.dtype, device: torch.device
) -> Callable[[], float]:
    """Return a function that runs one step of the trainer and returns its loss."""
    network: Any = copy.deepcopy(model).requires_grad_(True)
    stage = ArDiffusion(Denoiser(network, case.layout), copy.deepcopy(model), schedule=_SCHEDULE)
    folder = Path(tempfile.gettempdir())  # no checkpoint is written: only steps run
    made = Trainer("ar", stage, settings(), lambda position: batch, folder, dtype=dtype, device=device)

    def step() -> float:
        made.step += 1
        return made._one_step()["student_loss"]

    return step


def plain_loop(
    case: Case, model: nn.Module, batch: Batch, dtype: torch.dtype, device: torch.device
) -> Callable[[], float]:
    """Return a function that runs one step of the plain loop and returns its loss."""
    network, own = copy.deepcopy(model).requires_grad_(True), settings()
    ema = copy.deepcopy(model)
    weights = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=own.lr, betas=own.betas, weight_decay=own.weight_decay)
    tokens = case.config.tokens_per_frame(case.height, case.width)
    visible = masks.teacher_forcing(case.frames, case.layout.block, case.layout.window)
    mask = token_mask(visible, tokens).to(device)
    rng = torch.Generator().manual_seed(own.seed)
    sigmas, timesteps = _SCHEDULE.sigmas.to(device), _SCHEDULE.timesteps.to(device)
    level_weights = _SCHEDULE.training_weights().to(device)

    def step() -> float:
        clean = batch.latents
        assert isinstance(clean, Tensor)
        levels = block_indices(TABLE_SIZE, case.batch, case.frames, case.layout.block, rng).to(device)
        noise = normal_like(clean, rng)
        sigma = sigmas[levels][:, :, None, None, None]
        noisy = (1 - sigma) * clean + sigma * noise
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            velocity = teacher_forced(
                weights, case.config, clean, noisy, timesteps[levels], batch.condition.prompt_embeds, mask
            )
        error = (velocity.float() - (noise - clean)).square().mean(dim=(2, 3, 4))
        loss = (error * level_weights[levels]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), own.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), weights.values(), strict=True):
                average.lerp_(weight, 1 - own.ema)
        return loss.item()

    return step


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each (default: %(default)s)")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    rows = []
    print(f"{'case':>10} {'cfpp_ms':>9} {'plain_ms':>9} {'plain / cfpp':>12}")
    for case in CASES:
        model = fresh_model(case.config, 0).to(device)
        with torch.no_grad():
            model.head.head.weight.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(0))
        rng = torch.Generator().manual_seed(1)
        latents = torch.randn(case.batch, case.frames, 16, case.height, case.width, generator=rng)
        prompt_embeds = torch.randn(case.batch, case.config.text_len, case.config.text_dim, generator=rng)
        batch = Batch(Condition(prompt_embeds), latents).to(device)
        calls = {
            "cfpp": trainer(case, model, batch, dtype, device),
            "plain": plain_loop(case, model, batch, dtype, device),
        }
        ours, theirs = (call() for call in calls.values())
        if abs(ours - theirs) > (1e-4 if dtype == torch.float32 else 2e-2) * theirs:
            raise InputError(f"{case.name}: the losses must agree before they are timed, got {ours} and {theirs}")
        times = harness.measure_interleaved(calls, device, rounds=arguments.rounds)
        ratio = times["plain"].median_ms / times["cfpp"].median_ms
        print(f"{case.name:>10} {times['cfpp'].median_ms:>9.1f} {times['plain'].median_ms:>9.1f} {ratio:>12.2f}")
        for name, measured in times.items():
            rows.append(
                {
                    "bench": "train",
                    "case": case.name,
                    "loop": name,
                    "dtype": arguments.dtype,
                    "clip": [case.batch, case.frames, 16, case.height, case.width],
                    **dataclasses.asdict(measured),
                    "loss": ours if name == "cfpp" else theirs,
                }
            )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
