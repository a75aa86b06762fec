"""What a stage of the pipeline is to the trainer."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from cfpp_rt.distill.batch import Batch
from cfpp_rt.errors import InputError


class Stage(Protocol):
    """trained: the networks that learn, by name; "student" is one of them. ema: the student's moving average."""

    trained: dict[str, nn.Module]
    ema: nn.Module

    def updates(
        self, next_batch: Callable[[], Batch], draws: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        """The losses of one step, each with the name of the network that it trains.

        They are made one after the other: the trainer lets a loss change its network, and the moving average after the
        student's, before it asks for the next. All random numbers come from `draws`.
        """
        ...


def clips(batch: Batch) -> Tensor:
    """The batch's clean clips [B, F, C, h, w]; InputError if it has none."""
    if batch.latents is None:
        raise InputError("batch must hold latents for this stage, got prompts alone")
    return batch.latents
