"""The world's student as a pipeline: shipped with the package, or of your own making."""

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
_ROLLOUT = "rollout"  # the entry of student.json that tells how the student is to be run


def load_world_pipeline(
    folder: str | Path = SHIPPED,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    fuse: bool = True,
) -> Pipeline:
    """The student of a folder: student.safetensors, student.json (sizes and rollout settings), codec.safetensors.

    fuse: change the model for speed (`cfpp_rt.speed`); False keeps the published names of its weights.

    Raises CheckpointError for files that are missing or of something else.
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
    """The arenas of these seeds, drawn by the simulator: float32 [B, frames, 3, 48, 48] in [-1, 1], all still."""
    frame = render(Simulator(seeds).state)
    return to_pixels(np.repeat(frame[:, None], num_frames, axis=1))


def start(
    pipeline: Pipeline, seed: int, *, num_frames: int | None = None, config: RolloutConfig | None = None
) -> Stream:
    """A stream that begins in the arena of `seed`, 0..2**63 - 1: the simulator draws the first picture, the student
    all others. `stream.set_actions` steers it. num_frames: frames in all, the first included; None = without end.
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
