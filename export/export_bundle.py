"""Exports a student to an ONNX bundle: graphs, one shared weight file and the card, complete or not at all.

The transformer's graphs are written node by node (`transformer_onnx`). So no tracer decides what they contain, the same
student gives the same bytes, and the export needs little memory besides the model.
"""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cfpp_rt.codec.base import Codec
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import slots_for
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import WEIGHTS, Card, index_steps, require_linear_dtype, write_card
from cfpp_rt.export.check_onnx import check_graph
from cfpp_rt.export.codec_onnx import export_decoder
from cfpp_rt.export.contract import Sizes
from cfpp_rt.export.graph_builder import OPSET, WeightFile, require_onnx
from cfpp_rt.export.transformer_onnx import build_graph
from cfpp_rt.io.atomic import new_folder
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.runtime.rollout import PREFILL_TIMESTEP


def make_card(
    model: CausalWanTransformer,
    config: RolloutConfig,
    *,
    latent_size: tuple[int, int],
    latent_frames: int | None,
    batch: int = 1,
    linear_dtype: str | None = None,
    about: dict[str, Any] | None = None,
) -> Card:
    """Return the card of a student before its export. Arguments and errors: see `export_onnx`."""
    if config.kv_dtype is not None:
        raise InputError(f"kv_dtype must be None: graphs keep the cache in the model's dtype, got {config.kv_dtype!r}")
    require_linear_dtype(linear_dtype)
    n = config.frames_per_block
    if config.window is not None and (config.window - config.sinks) % n:
        raise InputError(
            f"window must be the sinks and whole blocks of {n} frames, so that a full ring is what is seen,"
            f" got window={config.window} and sinks={config.sinks}"
        )
    if latent_frames is not None and (latent_frames < 1 or latent_frames % n):
        raise InputError(f"latent_frames must be a multiple >= {n} of frames_per_block={n}, got {latent_frames}")
    if config.window is not None:
        latent_frames = None  # the ring has the size of the window, whatever the length of the video
    sinks, ring = slots_for(config.replace(refresh="separate"), latent_frames)  # no graph needs the spare slot
    schedule = FlowMatchSchedule(config.shift)
    lists = [schedule.warp(steps) for steps in (config.steps, config.first_steps or config.steps)]
    context = float(config.context_noise)
    known = sorted({context, PREFILL_TIMESTEP, *lists[0].tolist(), *lists[1].tolist()}, reverse=True)
    steps, first_steps = (index_steps(t.tolist(), schedule.sigma(t).tolist(), known) for t in lists)
    dtype = str(model.dtype).removeprefix("torch.")
    return Card(
        sizes=Sizes(model.config, batch, latent_size, n, sinks, ring, len(known), dtype),
        config=config,
        latent_frames=latent_frames,
        timesteps=tuple(known),
        steps=steps,
        first_steps=first_steps,
        context=known.index(context),
        given=known.index(PREFILL_TIMESTEP),
        linear_dtype=linear_dtype,
        codec=None,
        temporal_factor=1,
        about=about or {},
    )


def export_onnx(
    model: CausalWanTransformer,
    config: RolloutConfig,
    folder: str | Path,
    *,
    latent_size: tuple[int, int],
    latent_frames: int | None,
    batch: int = 1,
    linear_dtype: str | None = None,
    codec: Codec | None = None,
    about: dict[str, Any] | None = None,
) -> Card:
    """Write a bundle of the model's graphs, in the model's dtype, to a new folder; return its card.

    latent_size: (h, w).
    latent_frames: latent frames of the longest video, for which the cache has room. Not used with a window.
    batch: videos made together.
    linear_dtype: "float8_e4m3" for the linear layers of the blocks in 8 bits; None = the model's dtype.
    codec: its streaming decoder becomes part of the bundle, in its own dtype.
    about: further entries of the card about the student.

    Raises InputError for a folder that exists, settings that the graphs do not cover and a full disk, and
    MissingExtraError without the onnx package.
    """
    onnx = require_onnx()
    about = {**(about or {}), "versions": {"cfpp_rt": version("cfpp-rt"), "onnx": onnx.__version__, "opset": OPSET}}
    card = make_card(
        model,
        config,
        latent_size=latent_size,
        latent_frames=latent_frames,
        batch=batch,
        linear_dtype=linear_dtype,
        about=about,
    )
    times = torch.tensor(card.timesteps, dtype=torch.float64)
    with new_folder(folder, sum(parameter.nbytes for parameter in model.parameters())) as made:
        with torch.inference_mode(), WeightFile(made / WEIGHTS, card.sizes.dtype) as weights:
            for spec in card.graphs.values():
                graph = build_graph(model, card.sizes, spec, weights, times, linear_dtype)
                (made / f"{spec.name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        if codec is not None:
            decoders = export_decoder(codec, card.sizes, made)
            card = dataclasses.replace(card, codec=decoders, temporal_factor=codec.temporal_factor)
        for name, spec in card.graphs.items():
            check_graph(made / f"{name}.onnx", spec, linear_dtype)
        write_card(made, card)
    return card
