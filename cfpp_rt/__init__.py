"""A runtime for few-step autoregressive video diffusion students. The public names; docs/api.md describes them."""

import importlib
from typing import Any

# Public name -> module. A name is imported at first use, so that `cfpp --help` does not wait for torch. The types of
# these names stand in `__init__.pyi`.
_PUBLIC = {
    "FrameRing": "core.frame_ring",
    "KVCache": "cache",
    "RolloutBatch": "runtime.rollout_batch",
    "Cameras": "core.camera",
    "parse_trajectory": "core.camera",
    "walk": "core.camera",
    "TAEHV": "codec.taehv",
    "WanVAE": "codec.wan",
    "MODELS": "config",
    "PRESETS": "config",
    "ModelConfig": "config",
    "RolloutConfig": "config",
    "rollout_preset": "config",
    "decode_stream": "codec.streaming",
    "CheckpointError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "CausalWanTransformer": "model.transformer",
    "load_model": "model.weights",
    "Pipeline": "pipeline",
    "Rollout": "runtime.rollout",
    "Stream": "runtime.stream",
    "TextEncoder": "text",
    "Frames": "values",
    "Latents": "values",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cfpp_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cfpp_rt.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
