"""Small tensors from the host to where the model is, without making the host wait for the device's queue."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor, on `device`; the same tensor where it lies there already.

    A plain copy to CUDA waits until everything queued before it is done. One from pinned memory does not, and torch
    keeps that memory until the copy is.
    """
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
