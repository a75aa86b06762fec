"""Tolerance by comparison: a kernel may err at most `factor` times as much as plain PyTorch in the same dtype."""

import torch
from torch import Tensor


def _worst(error: Tensor) -> tuple[float, list[int]]:
    """Largest value and its position; NaN counts as infinite."""
    flat = int(error.nan_to_num(nan=float("inf")).argmax())
    position = [int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)]
    return float(error.nan_to_num(nan=float("inf")).max()), position


def assert_close_max(actual: Tensor, wanted: Tensor, limit: float, name: str = "result") -> None:
    """The largest absolute difference is at most `limit`; the message gives its position and both values."""
    assert actual.shape == wanted.shape, f"{name}: shape {list(actual.shape)}, wanted {list(wanted.shape)}"
    error, position = _worst((actual.double() - wanted.double()).abs())
    at = tuple(position)
    assert error <= limit, f"{name}{position}: {actual[at]} against {wanted[at]}, off by {error:.3g} > {limit:.3g}"


def assert_no_worse_than(
    actual: Tensor, plain: Tensor, oracle: Tensor, factor: float = 2.0, floor: float = 0.0, name: str = "result"
) -> None:
    """Largest error of `actual` <= factor * largest error of `plain` + floor, both against the float64 `oracle`."""
    assert actual.dtype == plain.dtype and oracle.dtype == torch.float64
    allowed, _ = _worst((plain.double() - oracle).abs())
    assert_close_max(actual, oracle, factor * allowed + floor, name)
