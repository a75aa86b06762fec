"""What the ops share: their torch.library namespace, when to go round it, the compiled modules and which one runs.

An op's module has `_run`, which calls the kernel or the reference, and `_fake`, which makes the result for tracing.
Its public function calls `_run` straight for `plain` tensors, since the dispatcher costs more than a small kernel, and
else what `register` returned, so that compilers, exporters and modes see the op. The bindings in csrc check what a
kernel gets; `expect` serves the paths without a kernel.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops import _triton

LIBRARY = torch.library.Library("cfpp_rt", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/common/dispatch.h
# Those with their CUDA kernel in Triton.
_TRITON_OPS = ("adaln_modulate", "gated_residual", "denoise_update", "quantize_rows", "rms_silu_")
OPS = ("kv_update_", "kv_dequantize_", "block_attention", *_TRITON_OPS)

_PLAIN_ON_CPU = {
    "rms_silu_": "plain PyTorch, so that the bits are the library's",
    "quantize_rows": "float8 products run on CUDA; the CPU only emulates them",
}

_CHOICES = ("auto", "reference", "cpu", "cuda")
_ATTENTION_CHOICES = ("kernel", "sdpa", "cudnn", "flash")  # force block_attention only, see ops/attention_table.py
_MODULES = {"cpu": "cfpp_rt._C", "cuda": "cfpp_rt._C_cuda"}
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}
# By name here, since `plain` runs before every kernel and looks each of them up.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform_level = torch._C._functorch.maybe_current_level
_is_tracing = torch._C._is_tracing
_profiler_enabled = torch._C._autograd._profiler_enabled


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the op of a schema, with `run` on CPU and CUDA; returns the op."""
    name = LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"cfpp_rt::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.cfpp_rt, name).default


def plain(tensors: tuple[Tensor, ...]) -> bool:
    """Nobody but the kernel needs to see this call: no gradient, compiler, tracer, profiler, mode or subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or _dispatch_modes()
        or _function_modes()
        or _transform_level() is not None  # vmap, functionalize
        or _is_tracing()  # torch.jit.trace
        or _profiler_enabled()
    ) and _PLAIN_TYPES.issuperset(map(type, tensors))


def wrong(op: str, name: str, wanted: str, got: object) -> InputError:
    return InputError(f"{op}: {name} must be {wanted}, got {got}")


def expect(op: str, name: str, tensor: Tensor, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError unless the tensor has this shape (axis name to size, in order), dtype and device."""
    if tuple(tensor.shape) != tuple(shape.values()):
        wanted = ", ".join(f"{axis}={size}" for axis, size in shape.items())
        raise wrong(op, name, f"[{wanted}]", list(tensor.shape))
    if tensor.dtype != dtype:
        raise wrong(op, name, str(dtype), tensor.dtype)
    if tensor.device != device:
        raise wrong(op, name, f"on {device}", tensor.device)


@functools.cache
def _load(device_type: str) -> tuple[ModuleType | None, str]:
    """The compiled module for a device type, and why it is there or not; a failed try is not repeated."""
    name = _MODULES.get(device_type)
    if name is None:
        return None, f"no kernels for {device_type}"
    try:
        return importlib.import_module(name), f"compiled module {name}"
    except ImportError as error:
        hint = "built without nvcc?" if device_type == "cuda" else "built with CFPP_BUILD=none?"
        return None, f"{name} cannot be imported ({hint} {error})"


@functools.cache
def choose(device_type: str) -> tuple[ModuleType | None, str]:
    """The module that runs the ops on a device type (None = the reference), and why.

    CFPP_BACKEND: auto takes the compiled module where there is one; cpu and cuda demand it for their device type;
    reference takes plain PyTorch everywhere. Raises InputError for another value, or a demand that cannot be met.
    """
    wanted = os.environ.get("CFPP_BACKEND", "auto")
    if wanted not in (*_CHOICES, *_ATTENTION_CHOICES):
        raise InputError(f"CFPP_BACKEND must be one of {', '.join(_CHOICES + _ATTENTION_CHOICES)}, got {wanted!r}")
    if wanted == "reference":
        return None, "CFPP_BACKEND=reference"
    module, reason = _load(device_type)
    if module is None and wanted == device_type:
        raise InputError(f"CFPP_BACKEND={wanted} cannot be met: {reason}")
    return module, reason


def kernels(device_type: str) -> ModuleType | None:
    """`choose` for the ops themselves: the first time that a kernel is missing, a warning says so."""
    module, reason = choose(device_type)
    if module is None and os.environ.get("CFPP_BACKEND", "auto") != "reference":
        _warn_once(f"cfpp_rt ops on {device_type} run in plain PyTorch: {reason}")
    return module


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _kernel_of(op: str) -> tuple[bool, str]:
    """Whether an op has its kernel for CUDA, and which."""
    if op in _TRITON_OPS:
        return _triton.choose()
    module, reason = _load("cuda")
    return module is not None, reason


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """For each op and device type: the backend that runs it ("none" without such a device), and why."""
    rows: dict[str, dict[str, tuple[str, str]]] = {op: {} for op in OPS}
    for op in OPS:
        for device_type in _MODULES:
            if device_type == "cuda" and not torch.cuda.is_available():
                rows[op][device_type] = ("none", f"no CUDA GPU; {_kernel_of(op)[1]}")
            elif device_type == "cuda" and op in _TRITON_OPS:
                ours, reason = _triton.choose()
                rows[op][device_type] = ("triton" if ours else "reference", reason)
            elif device_type == "cpu" and op in _PLAIN_ON_CPU:
                rows[op][device_type] = ("reference", _PLAIN_ON_CPU[op])
            else:
                module, reason = choose(device_type)
                rows[op][device_type] = (device_type if module is not None else "reference", reason)
    return rows
