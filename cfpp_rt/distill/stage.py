"""The interface between a training stage and the trainer."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from cfpp_rt.distill.batch import Batch
from cfpp_rt.errors import InputError


class Stage(Protocol):
    """A stage of the pipeline as the trainer uses it.

    trained: the networks that learn, by name; "student" is one of them.
    ema: the student's moving average.
    """

    trained: dict[str, nn.Module]
    ema: nn.Module

    def updates(
        self, next_batch: Callable[[], Batch], generator: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the losses of one step, each with the name of the network that it trains.

        The trainer updates the network (and after the student its moving average) before it takes the next loss.
        generator: source of all random numbers.
        """
        ...


def clean_latents(batch: Batch) -> Tensor:
    """Return the batch's clean clips [B, F, C, h, w]. Raise InputError if it has none."""
    if batch.latents is None:
        raise InputError("batch must have latents for this stage, got prompts alone")
    return batch.latents
