"""Registration of the ops with torch.library, the bypass of the dispatcher, and the choice of the compiled module.

The module of an op has `_run`, which calls the kernel or the reference, and `_fake`, which allocates the result for
tracing. Its public function calls `_run` directly if `can_bypass_dispatcher` allows it, since the dispatcher costs more
than a small kernel. Otherwise it calls what `register` returned, so that compilers, exporters and modes observe the op.
The bindings in csrc check the arguments of a kernel; `_checks` serves the calls that run without one.
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
_TRITON_OPS = ("adaln_modulate", "gated_residual", "denoise_update", "quantize_rows", "rms_silu_")
OPS = ("kv_update_", "kv_dequantize_", "block_attention", *_TRITON_OPS)

# Ops that run in plain PyTorch on the CPU by design, and the reason.
_REFERENCE_ON_CPU = {
    "rms_silu_": "plain PyTorch, so that the bits are the library's",
    "quantize_rows": "float8 products run on CUDA; the CPU only emulates them",
}

_CHOICES = ("auto", "reference", "cpu", "cuda")
_ATTENTION_CHOICES = ("kernel", "sdpa", "cudnn", "flash")  # choose block_attention only, see ops/attention_table.py
_MODULES = {"cpu": "cfpp_rt._C", "cuda": "cfpp_rt._C_cuda"}
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}
# Bound to names here because `can_bypass_dispatcher` runs before every kernel, and attribute lookups take time.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform_level = torch._C._functorch.maybe_current_level
_is_tracing = torch._C._is_tracing
_profiler_enabled = torch._C._autograd._profiler_enabled


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the op of a schema, implemented by `run` on CPU and CUDA, and return it."""
    name = LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"cfpp_rt::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.cfpp_rt, name).default


def can_bypass_dispatcher(tensors: tuple[Tensor, ...]) -> bool:
    """Return True if no autograd, compiler, tracer, profiler, mode or tensor subclass must observe this call."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or _dispatch_modes()
        or _function_modes()
        or _transform_level() is not None  # vmap, functionalize
        or _is_tracing()  # torch.jit.trace
        or _profiler_enabled()
    ) and _PLAIN_TYPES.issuperset(map(type, tensors))


@functools.cache
def _load(device_type: str) -> tuple[ModuleType | None, str]:
    """Return the compiled module for a device type, or None, and the reason; a failed import is not repeated."""
    name = _MODULES.get(device_type)
    if name is None:
        return None, f"no kernels for {device_type}"
    try:
        return importlib.import_module(name), f"compiled module {name}"
    except ImportError as error:
        hint = "built without nvcc?" if device_type == "cuda" else "built with CFPP_BUILD=none?"
        return None, f"{name} cannot be imported ({hint} {error})"


@functools.cache
def choose_backend(device_type: str) -> tuple[ModuleType | None, str]:
    """Return the compiled module that runs the ops on a device type (None = the reference), and the reason.

    The environment variable CFPP_BACKEND decides: auto takes the compiled module if there is one; cpu and cuda require
    it for their device type; reference takes plain PyTorch everywhere. Raises InputError for any other value, and if a
    required module is missing.
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


def compiled_module(device_type: str) -> ModuleType | None:
    """Return the module of `choose_backend`; warn once if it is missing and the reference was not requested."""
    module, reason = choose_backend(device_type)
    if module is None and os.environ.get("CFPP_BACKEND", "auto") != "reference":
        _warn_once(f"cfpp_rt ops on {device_type} run in plain PyTorch: {reason}")
    return module


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _cuda_kernel(op: str) -> tuple[bool, str]:
    """Return True if the CUDA kernel of an op is available, and the reason."""
    if op in _TRITON_OPS:
        return _triton.choose_backend()
    module, reason = _load("cuda")
    return module is not None, reason


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """Return, for each op and device type, the backend that runs it ("none" without such a device) and the reason."""
    rows: dict[str, dict[str, tuple[str, str]]] = {op: {} for op in OPS}
    for op in OPS:
        for device_type in _MODULES:
            if device_type == "cuda" and not torch.cuda.is_available():
                rows[op][device_type] = ("none", f"no CUDA GPU; {_cuda_kernel(op)[1]}")
            elif device_type == "cuda" and op in _TRITON_OPS:
                available, reason = _triton.choose_backend()
                rows[op][device_type] = ("triton" if available else "reference", reason)
            elif device_type == "cpu" and op in _REFERENCE_ON_CPU:
                rows[op][device_type] = ("reference", _REFERENCE_ON_CPU[op])
            else:
                module, reason = choose_backend(device_type)
                rows[op][device_type] = (device_type if module is not None else "reference", reason)
    return rows
