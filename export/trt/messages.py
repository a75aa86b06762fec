"""Explanations of the library's error texts. docs/tensorrt.md lists the same; a test keeps the two equal."""

import re

# Part of the library's text -> its meaning for these graphs.
FAULTS: dict[str, str] = {
    r"Only linear mode is supported": "TensorScatter must have mode=linear; a ring of frame slots needs no other",
    r"Attention nodes with one output": "Attention must have one output: write the cache with TensorScatter",
    r"softmax precision is not supported": "Attention must leave softmax_precision out",
    r"static sequence length": "the capacity of a cache must be a fixed number in the graph",
    r"Sequence dimension must be -2": "a cache must be [B, H, capacity, D], updated along axis -2",
    r"cache tensor must be a network input": "an updated cache must be an input of the graph itself",
    r"output tensor must be a network output": "an updated cache must be an output of the graph",
    r"Input index already mapped to an output": "two updates write the same cache: one engine may update a cache once",
    r"Quantized data types|must have type Float, Half, or BFloat16": "a cache must be float32, float16 or bfloat16",
    r"is_decomposable\(\)": "attention in this dtype or head size has no fused kernel on the target",
    r"HW-specific datatypes: (fp8|b16)": "the target cannot compute in a dtype of the graph: "
    "export in float16, without --linear-dtype",
    r"graph_jit\.cpp:\d+: CHECK\(status == CUDA_SUCCESS\)": "refittable and stripped weights need a GPU driver on the "
    "machine that builds (TensorRT-RTX 1.7.1): build with --weights embedded, or on a machine with a GPU",
    r"ssa_validation": "two attention outputs go straight into one Concat: put the output projection between",
    r"cudaError 35|driver version is insufficient": "the target 'current' and running an engine need a GPU driver; "
    "choose --targets sm89 or another architecture to build ahead of time",
    r"libnvinfer_lean": "version-compatible engines need the lean runtime, which is not installed",
    r"[Oo]ut of memory|bad_alloc|Cannot allocate memory": "the build needs more memory than this machine has",
}


def explain(text: str) -> str:
    """Return the library's text on one line, preceded by its meaning where that is known."""
    line = " ".join(text.split())
    short = line if len(line) <= 300 else line[:297] + "..."
    meaning = next((meaning for part, meaning in FAULTS.items() if re.search(part, line)), None)
    return short if meaning is None else f"{meaning} ({short})"
