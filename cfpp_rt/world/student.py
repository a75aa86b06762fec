"""Students of the world as pipelines: the shipped one, or one that you have trained."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import CheckpointError
from cfpp_rt.model.weights import load_model
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.speed import fuse_gelu, fuse_qkv, has_fused_gelu
from cfpp_rt.values import empty_prompt_embeds
from cfpp_rt.world.codec import PatchCodec, to_pixels
from cfpp_rt.world.simulator import Simulator
from cfpp_rt.world.sprites import SIZE, render

SHIPPED = Path(__file__).parent / "weights"
_ROLLOUT = "rollout"  # entry of student.json with the rollout settings


def load_world_pipeline(
    folder: str | Path = SHIPPED,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    fuse: bool = True,
) -> Pipeline:
    """Load a student from a folder: student.safetensors, student.json (sizes and rollout settings), codec.safetensors.

    fuse: fuse layers for speed (`cfpp_rt.speed`); False keeps the published names of the weights.
    Raise CheckpointError for files that are missing or have other contents.
    """
    folder = Path(folder)
    model = load_model(folder / "student.safetensors", dtype=dtype, device=device)
    if fuse:
        fuse_qkv(model)
        if has_fused_gelu(model.device, model.dtype):
            fuse_gelu(model)
    codec = PatchCodec.load(folder / "codec.safetensors", device)
    return Pipeline(model, codec, None, _rollout(folder / "student.json"))


def _rollout(path: Path) -> RolloutConfig:
    try:
        return RolloutConfig(**json.loads(path.read_text(encoding="utf-8"))[_ROLLOUT])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: wanted sizes and {_ROLLOUT!r} settings of a world student ({error})") from error


def first_frames(seeds: list[int], num_frames: int = 1) -> Tensor:
    """Render the arenas of these seeds: float32 [B, num_frames, 3, 48, 48] in [-1, 1], the same frame repeated."""
    frame = render(Simulator(seeds).state)
    return to_pixels(np.repeat(frame[:, None], num_frames, axis=1))


def start(
    pipeline: Pipeline, seed: int, *, num_frames: int | None = None, config: RolloutConfig | None = None
) -> Stream:
    """Start a stream in the arena of a seed. The simulator renders the first block, the student makes all others.

    Steer it with `stream.set_actions`.
    seed: 0..2**63 - 1.
    num_frames: number of frames, including the first; None = endless.
    config: None = that of the pipeline.
    """
    config = config or pipeline.config
    return pipeline.stream(
        prompt_embeds=empty_prompt_embeds(1, pipeline.model.config.text_dim),
        num_frames=num_frames,
        height=SIZE,
        width=SIZE,
        seed=seed,
        initial_frames=first_frames([seed], config.frames_per_block),
        config=config,
    )
