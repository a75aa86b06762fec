"""Copies of small tensors from the host to the device, without waiting for the queue of the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on `device`; the same tensor if it is there already.

    An ordinary copy to CUDA waits until all work queued before it is done. A copy from pinned memory does not wait, and
    torch keeps that memory until the copy is done.
    """
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
