"""Marks of tests that need an optional library."""

import importlib.util

import pytest

_MISSING = [name for name in ("onnx", "tensorrt_rtx") if importlib.util.find_spec(name) is None]
needs_tensorrt = pytest.mark.skipif(
    bool(_MISSING), reason=f"NO ENGINE IS BUILT: {', '.join(_MISSING)} missing; pip install 'cfpp-rt[tensorrt]'"
)
