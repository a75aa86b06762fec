"""Checks of arguments that several ops share; all messages come from `argument_error`."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError

TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def argument_error(op: str, name: str, wanted: str, got: object) -> InputError:
    """Return the error for an argument that is not what the op wants."""
    return InputError(f"{op}: {name} must be {wanted}, got {got}")


def require_tensor(
    op: str, name: str, tensor: Tensor, shape: dict[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise InputError unless the tensor has this shape (axis name to size, in order), dtype and device."""
    if tuple(tensor.shape) != tuple(shape.values()):
        wanted = ", ".join(f"{axis}={size}" for axis, size in shape.items())
        raise argument_error(op, name, f"[{wanted}]", list(tensor.shape))
    if tensor.dtype != dtype:
        raise argument_error(op, name, str(dtype), tensor.dtype)
    if tensor.device != device:
        raise argument_error(op, name, f"on {device}", tensor.device)


def require_tokens(op: str, x: Tensor) -> None:
    """Raise InputError unless x is [B, S, dim] in one of TOKEN_DTYPES with a contiguous last dimension."""
    if x.ndim != 3:
        raise argument_error(op, "x", "[B, S, dim]", list(x.shape))
    if x.dtype not in TOKEN_DTYPES:
        raise argument_error(op, "x", "torch.float32 or torch.bfloat16 or torch.float16 or torch.float64", x.dtype)
    require_like_tokens(op, "x", x, x)


def require_modulation(op: str, name: str, rows: Tensor, x: Tensor, frames: int | None = None) -> None:
    """Raise InputError unless rows are modulation rows [B or 1, F, dim] for the tokens x [B, S, dim].

    frames: the F that is wanted; None = any divisor of S.
    """
    batch, tokens, dim = x.shape
    fits = rows.ndim == 3 and rows.shape[0] in (1, batch) and rows.shape[2] == dim
    if not fits or rows.shape[1] < 1 or tokens % rows.shape[1] or frames not in (None, rows.shape[1]):
        wanted = f"F a divisor of S={tokens}" if frames is None else f"F={frames}"
        raise argument_error(op, name, f"[B={batch} or 1, F, dim={dim}] with {wanted}", list(rows.shape))
    require_like_tokens(op, name, rows, x)


def require_like_tokens(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise InputError unless the tensor has the dtype and device of x and a contiguous last dimension."""
    require_same_dtype_and_device(op, name, tensor, x)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise argument_error(op, name, "contiguous in its last dimension", f"stride {tensor.stride(-1)}")


def require_same_dtype_and_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise InputError unless the tensor has the dtype and device of x."""
    if tensor.dtype != x.dtype:
        raise argument_error(op, name, f"{x.dtype} like x", tensor.dtype)
    if tensor.device != x.device:
        raise argument_error(op, name, f"on {x.device} like x", tensor.device)
