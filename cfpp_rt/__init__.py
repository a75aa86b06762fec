"""A runtime for few-step autoregressive video diffusion students. The public names; docs/api.md describes them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfpp_rt.batch import StreamBatch as StreamBatch
    from cfpp_rt.cache import KVCache as KVCache
    from cfpp_rt.camera import Cameras as Cameras
    from cfpp_rt.camera import parse_trajectory as parse_trajectory
    from cfpp_rt.camera import walk as walk
    from cfpp_rt.codec.taehv import TAEHV as TAEHV
    from cfpp_rt.codec.wan import WanVAE as WanVAE
    from cfpp_rt.config import MODELS as MODELS
    from cfpp_rt.config import STUDENTS as STUDENTS
    from cfpp_rt.config import ModelConfig as ModelConfig
    from cfpp_rt.config import RolloutConfig as RolloutConfig
    from cfpp_rt.config import student as student
    from cfpp_rt.decode import decode_stream as decode_stream
    from cfpp_rt.errors import CheckpointError as CheckpointError
    from cfpp_rt.errors import InputError as InputError
    from cfpp_rt.errors import MissingExtraError as MissingExtraError
    from cfpp_rt.errors import NonFiniteError as NonFiniteError
    from cfpp_rt.errors import OutOfMemoryError as OutOfMemoryError
    from cfpp_rt.model.transformer import CausalWanTransformer as CausalWanTransformer
    from cfpp_rt.model.weights import load_model as load_model
    from cfpp_rt.pipeline import Pipeline as Pipeline
    from cfpp_rt.ring import FrameRing as FrameRing
    from cfpp_rt.rollout import Rollout as Rollout
    from cfpp_rt.session import Stream as Stream
    from cfpp_rt.text import TextEncoder as TextEncoder
    from cfpp_rt.values import Conditioning as Conditioning
    from cfpp_rt.values import Frames as Frames
    from cfpp_rt.values import Latents as Latents

# Name -> module. Imported at first use, so that `cfpp --help` does not wait for torch.
_PUBLIC = {
    "FrameRing": "ring",
    "KVCache": "cache",
    "StreamBatch": "batch",
    "Cameras": "camera",
    "parse_trajectory": "camera",
    "walk": "camera",
    "TAEHV": "codec.taehv",
    "WanVAE": "codec.wan",
    "MODELS": "config",
    "STUDENTS": "config",
    "ModelConfig": "config",
    "RolloutConfig": "config",
    "student": "config",
    "decode_stream": "decode",
    "CheckpointError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "CausalWanTransformer": "model.transformer",
    "load_model": "model.weights",
    "Pipeline": "pipeline",
    "Rollout": "rollout",
    "Stream": "session",
    "TextEncoder": "text",
    "Conditioning": "values",
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
