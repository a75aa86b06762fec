"""Copies of small tensors from the host to the device that do not wait for the device's queue."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`, and the tensor itself where it lies there already.

    A plain copy to CUDA waits until everything queued before it is done. A copy from pinned memory does not, and torch
    keeps that memory until the copy is done.
    """
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
