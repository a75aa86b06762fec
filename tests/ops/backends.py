"""The backends that tests of pointwise ops run: plain PyTorch, the C++ kernel, the Triton kernel on CPU and GPU."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_no_worse_than

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPILED = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETER = pytest.param(
    "interpreter",
    marks=[
        pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
        pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the Triton kernels"),
    ],
)
BACKENDS = [*COMPILED, INTERPRETER]


def implementation(op: str, backend: str, function: str | None = None) -> Callable[..., Any]:
    """The function of an op on a backend; "interpreter" is its Triton kernel. function: its name, None = the op."""
    rooms = {"reference": f"cfpp_rt.reference.{op}", "interpreter": f"cfpp_rt.ops.{op}_triton"}
    return getattr(importlib.import_module(rooms.get(backend, f"cfpp_rt.ops.{op}")), function or op)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_as_good(actual: Tensor, plain: Tensor, oracle: Tensor, backend: str, name: str) -> None:
    """Assert at most twice the error of plain PyTorch, or one float32 rounding if that is larger."""
    narrow = torch.float32
    if backend == "interpreter" and actual.dtype == torch.bfloat16:
        narrow = torch.bfloat16  # the interpreter cuts bits off where a GPU rounds
    floor = torch.finfo(narrow).eps * float(oracle.abs().max())
    assert_no_worse_than(actual, plain, oracle, floor=floor, name=name)
