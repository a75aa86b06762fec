"""`cfpp doctor`: what is here, which backend runs each op and why, and the command that adds what is missing."""

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Extra in pyproject.toml -> the modules that it brings.
EXTRAS = {
    "video": ("av", "PIL", "tqdm"),
    "wan": ("diffusers", "transformers", "accelerate", "sentencepiece", "ftfy"),
    "train": ("yaml", "tqdm"),
    "lmdb": ("lmdb",),
    "tensorboard": ("tensorboard",),
    "triton": ("triton",),
    "flash": ("flash_attn",),
    "flash3": ("fa3_fwd_interface",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "tensorrt": ("tensorrt_rtx", "cuda.bindings"),
    "tensorrt-gpu": ("tensorrt", "cuda.bindings"),
    "bench": ("matplotlib", "psutil"),
}
# Module -> the distribution on PyPI, where their names differ in more than a dash.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "cuda.bindings": "cuda-bindings",
    "fa3_fwd_interface": "fa3-fwd",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults()


def run(arguments: argparse.Namespace) -> None:
    import torch

    from cfpp_rt.ops import backends
    from cfpp_rt.ops.attention_libraries import flash_module
    from cfpp_rt.ops.block_attention import why_not_kernel

    print(f"cfpp-rt  {version('cfpp-rt')}")
    print(f"python   {platform.python_version()} on {platform.platform()}")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch    {torch.__version__}, {torch.get_num_threads()} CPU threads, {capability}")
    print("devices")
    print("  cpu")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        print(f"  cuda:{index}  {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    print("ops")
    for op, rows in backends().items():
        for device, (backend, reason) in rows.items():
            print(f"  {op:<16} {device:<5} {backend:<10} {reason}")
    print("block_attention on 1560 queries of head_dim 128, 9360 tokens visible")
    for name in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            backend, reason = _attention(torch.device(name), dtype)
            print(f"  {name:<8} {str(dtype).removeprefix('torch.'):<8} {backend:<8} {reason}")
    print("CUDA graphs of a rollout's passes, head_dim 128")
    if not torch.cuda.is_available():
        print("  none: no CUDA GPU")
    for index in range(torch.cuda.device_count()):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            why_not = why_not_kernel(torch.device("cuda", index), dtype, 128)
            print(f"  cuda:{index:<3} {str(dtype).removeprefix('torch.'):<8} {'yes' if why_not is None else why_not}")
    flash = flash_module()
    print(f"FlashAttention\n  {f'version {flash[0]}, module {flash[1]}' if flash else 'none'}")
    print("extras")
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if not _installed(name)]
        found = ", ".join(f"{name} {_version(name)}" for name in modules if name not in missing)
        print(f"  {extra:<12} {found or 'nothing'}")
        if missing:
            print(f"               missing {', '.join(missing)}: pip install 'cfpp-rt[{extra}]'")


def _attention(device: "torch.device", dtype: "torch.dtype") -> tuple[str, str]:
    import torch

    from cfpp_rt.ops._library import choose_backend
    from cfpp_rt.ops.attention_table import BACKENDS, Problem, choose_attention

    forced = os.environ.get("CFPP_BACKEND", "auto")
    if forced in BACKENDS:
        return forced, f"CFPP_BACKEND={forced}"
    module, reason = choose_backend(device.type)
    if module is None:
        return "reference", reason
    if forced == device.type:
        return "kernel", f"CFPP_BACKEND={forced}"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return choose_attention(Problem(device.type, capability, dtype, 128, 1560, 9360))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _version(module: str) -> str:
    try:
        return version(DISTRIBUTIONS.get(module, module))
    except PackageNotFoundError:
        return "?"
