"""Small students of random weights as ONNX bundles, for the tests of engines."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.export.bundle import Bundle, Card, open_bundle
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.model.transformer import random_model

TINY = ModelConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2, freq_dim=16, text_dim=32, text_len=8)
WORLD = dataclasses.replace(TINY, text_len=0, num_actions=5)
ROLLING = RolloutConfig(window=4, sinks=1)


def bytes_moved(card: Card, *passes: str, resident: tuple[str, ...] = ()) -> int:
    """Return the bytes that these passes exchange: inputs and outputs except caches, text keys and `resident`."""
    moved = 0
    for spec in (card.graphs[name] for name in passes):
        caches = {*spec.aliases, *spec.aliases.values()}
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name not in caches and not tensor.name.startswith(("text_", *resident)):
                moved += math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    return moved


def exported(
    folder: Path,
    config: ModelConfig = TINY,
    rollout: RolloutConfig = ROLLING,
    dtype: str = "float16",
    **options: Any,
) -> Bundle:
    """Export a student of random weights, 4 x 6 latents; return the opened ONNX bundle."""
    model = random_model(config, seed=0, dtype=getattr(torch, dtype))
    export_onnx(model, rollout, folder, latent_size=(4, 6), latent_frames=6, **options)
    return open_bundle(folder)
