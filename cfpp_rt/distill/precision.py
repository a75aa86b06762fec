"""Arithmetic in a 16-bit dtype over float32 weights: an update is often smaller than half a step of bfloat16."""

import copy

import torch
from torch import nn


class MasterWeights:
    """The float32 weights of a network that computes in `dtype`.

    Optimiser, moving average and checkpoints use `module`, a network with these weights. `network` computes. They are
    the same object in float32 and where the network is sharded: shards are float32 and are cast when they are
    gathered. Otherwise `module` is a float32 copy and `network` is cast to `dtype` in place.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32):
        self.network = self.module = network
        if dtype != torch.float32:
            self.module = copy.deepcopy(network)
            network.to(dtype)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the gradients of `network` to those of `module` in float32, and clear them in `network`."""
        if self.module is self.network:
            return
        for master, compute in zip(self.module.parameters(), self.network.parameters(), strict=True):
            if compute.grad is not None:
                master.grad = compute.grad.float() if master.grad is None else master.grad.add_(compute.grad)
                compute.grad = None

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the weights of `module` into `network`, rounded to its dtype."""
        if self.module is not self.network:
            for master, compute in zip(self.module.parameters(), self.network.parameters(), strict=True):
                compute.copy_(master)
