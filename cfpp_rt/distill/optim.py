"""Optimisers, their learning rate over time, and the student's moving average."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from cfpp_rt.distill.muon import StackedMuon
from cfpp_rt.distill.settings import StageSettings

_MUON_FACTOR = 10.0  # its updates are orthogonal matrices: the step that suits is larger than AdamW's


def make_optimizers(network: nn.Module, settings: StageSettings, lr: float) -> list[Optimizer]:
    """AdamW for all weights; with muon, Muon for the matrices of the blocks and AdamW for the rest."""
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    hidden: list[nn.Parameter] = []
    if settings.optimizer == "muon":
        hidden = [p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2]
    rest = [p for p in parameters.values() if all(p is not other for other in hidden)]
    optimizers: list[Optimizer] = [AdamW(rest, lr=lr, betas=settings.betas, weight_decay=settings.weight_decay)]
    if hidden:
        optimizers.append(StackedMuon(hidden, lr=_MUON_FACTOR * lr, weight_decay=settings.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, settings: StageSettings) -> float:
    """Learning rate of a step, 0 for the first, as a share of the peak: linear rise, then a cosine down to `decay`."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.decay + (1 - settings.decay) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, step: int, settings: StageSettings) -> None:
    """ema = decay * ema + (1 - decay) * network; before ema_start a copy of the network."""
    decay = settings.ema if step >= settings.ema_start else 0.0
    kept, now = ([p.data for p in module.parameters()] for module in (ema, network))
    torch._foreach_lerp_(kept, now, 1 - decay)
