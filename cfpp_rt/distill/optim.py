"""Optimisers, the learning rate over time, and the moving average of the student."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from cfpp_rt.distill.muon import StackedMuon
from cfpp_rt.distill.settings import StageSettings

_MUON_FACTOR = 10.0  # Muon's updates are orthogonal matrices, which need a larger step than AdamW's


def make_optimizers(network: nn.Module, settings: StageSettings, lr: float) -> list[Optimizer]:
    """Return AdamW for all weights; with muon, AdamW and then Muon for the matrices of the blocks.

    lr: peak learning rate of AdamW; that of Muon is 10 times as large. Groups store theirs under "peak".
    """
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


def learning_rate_share(step: int, settings: StageSettings) -> float:
    """Return the learning rate of a step (0 for the first) as a share of the peak.

    It rises linearly for `warmup` steps, then falls along a cosine to the share `decay` at the last step.
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.decay + (1 - settings.decay) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, step: int, settings: StageSettings) -> None:
    """Set ema to decay * ema + (1 - decay) * network, in place; before step `ema_start`, to a copy of the network."""
    decay = settings.ema if step >= settings.ema_start else 0.0
    averages, weights = ([p.data for p in module.parameters()] for module in (ema, network))
    torch._foreach_lerp_(averages, weights, 1 - decay)
