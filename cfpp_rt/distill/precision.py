"""Arithmetic in a dtype of 16 bits over weights of 32: an update is often smaller than half a step of bfloat16."""

import copy

import torch
from torch import nn


class Master:
    """The float32 weights of a network that computes in `dtype`: what optimiser, moving average and checkpoints see.

    module: those weights, as a network. In float32, and where the network is sharded (its shards are float32 and are
    cast when they are gathered), that is the network itself. Else it is a copy; `network` is cast in place.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32):
        self.network = self.module = network
        if dtype != torch.float32:
            self.module = copy.deepcopy(network)
            network.to(dtype)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the network's gradients to the master's, in float32, and forget them there."""
        if self.module is self.network:
            return
        for kept, used in zip(self.module.parameters(), self.network.parameters(), strict=True):
            if used.grad is not None:
                kept.grad = used.grad.float() if kept.grad is None else kept.grad.add_(used.grad)
                used.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master's weights into the network."""
        if self.module is not self.network:
            for kept, used in zip(self.module.parameters(), self.network.parameters(), strict=True):
                used.copy_(kept)
