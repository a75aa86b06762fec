"""What every exported graph takes and gives: the one declaration that exporter, verifier, builder and runner read.

A bundle is made for one size: every dimension is a number, since a cache that is updated in place must have a static
length, and engines of static shape build fast. Host and graph meet in few, small inputs per pass; what is large (the
caches, the keys of the text) stays where it is between passes.

The passes write a block's keys and values into its frame slots by TensorScatter, and hand the whole updated cache to
one Attention per layer:

    step     one block; sees the first `valid` tokens of the cache. A ring that has wrapped is full, and attention does
             not care about the order of keys, so a length is all it takes, with window and sinks too.
    refresh  the same for a finished block of which only keys and values are wanted: no velocity.
    fused    a finished block and the next one in its first step. Only the finished block is written; the keys of the
             noisy one are appended for this pass alone, since the next pass over that block makes them anew. So the
             ring needs no spare slot, and `visible` says per group which slots its queries see.

A model with the camera branch has a second pair of caches per layer, in the same slots, and takes P and P^-1 of every
frame of a pass (`projections`).

Caches start as zeros: what is not visible is weighted with 0, and must be finite for that.

This module imports neither torch nor onnx.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cfpp_rt.config import ModelConfig
from cfpp_rt.core.rope_angles import pairs_of
from cfpp_rt.errors import InputError

FLOATS = ("float32", "float16", "bfloat16")
PASSES = ("step", "refresh", "fused")
DECODERS, ENCODER = ("decode_first", "decode_next"), "encode"  # of a codec; declared in the card


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output. dtype: a name as numpy's, or bfloat16. low, high: inclusive range of an integer input.

    updates: of an output, the input whose contents it continues. Where the runtime allows, both are one buffer: binding
    the same memory to both names must be correct, and the input is never read after the update.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: int | None = None
    high: int | None = None
    updates: str | None = None


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """One graph: its name (the file is `<name>.onnx`), inputs and outputs in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def aliases(self) -> dict[str, str]:
        """Output name to the name of the input that it updates."""
        return {tensor.name: tensor.updates for tensor in self.outputs if tensor.updates is not None}

    def input(self, name: str) -> TensorSpec:
        return next(tensor for tensor in self.inputs if tensor.name == name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GraphSpec":
        """The inverse of `dataclasses.asdict`, through JSON."""
        inputs, outputs = (
            tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in values[side])
            for side in ("inputs", "outputs")
        )
        return cls(values["name"], inputs, outputs)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Everything that shapes depend on.

    latent_size: (h, w). block: latent frames made together. sinks, ring: slots of the cache, as in `FrameRing`.
    timesteps: how many distinct timesteps the rollout uses (the card lists them). dtype: of weights and caches.
    """

    model: ModelConfig
    batch: int
    latent_size: tuple[int, int]
    block: int
    sinks: int
    ring: int
    timesteps: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise InputError(f"dtype must be one of {', '.join(FLOATS)}, got {self.dtype!r}")
        for name in ("batch", "block", "ring", "timesteps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}")
        self.model.tokens_per_frame(*self.latent_size)  # raises where the patch does not fit

    @property
    def tokens(self) -> int:
        """Of one latent frame."""
        return self.model.tokens_per_frame(*self.latent_size)

    @property
    def slots(self) -> int:
        """Capacity of the cache in latent frames."""
        return self.sinks + self.ring

    @property
    def time_pairs(self) -> int:
        """Channel pairs of a head that turn with the frame index; the other two thirds belong to rows and columns."""
        return pairs_of(self.model.head_dim)[0]

    @property
    def modulation_rows(self) -> int:
        """Rows of `modulation`: shift, 1 + scale, gate, shift, 1 + scale, gate of each layer; shift, 1 + scale of the
        head.
        """
        return 6 * self.model.num_layers + 2

    def frame_shape(self, frames: int) -> tuple[int, ...]:
        return (self.batch, frames, self.model.in_dim, *self.latent_size)


def caches_of_layer(model: ModelConfig, layer: int) -> list[str]:
    """Names of a layer's caches: keys, values, and those of the camera branch where the model has one."""
    kinds = ("keys", "values", "camera_keys", "camera_values")
    return [f"{kind}.{layer}" for kind in kinds[: 4 if model.camera else 2]]


def cache_names(model: ModelConfig) -> list[str]:
    return [name for layer in range(model.num_layers) for name in caches_of_layer(model, layer)]


def text_names(layers: int) -> list[str]:
    return [f"text_{kind}.{layer}" for layer in range(layers) for kind in ("keys", "values")]


def updated(name: str) -> str:
    """The output that continues this input."""
    return f"{name}.updated"


def network_graphs(sizes: Sizes) -> dict[str, GraphSpec]:
    """The graphs of the transformer by name: embed_time, embed_text (of a model with text) and the three `PASSES`."""
    graphs = [_embed_time(sizes), *([_embed_text(sizes)] if sizes.model.text_len else [])]
    graphs += [_pass(sizes, name) for name in PASSES]
    return {graph.name: graph for graph in graphs}


def _embed_time(sizes: Sizes) -> GraphSpec:
    """One timestep of the card's list, and the actions of a block, to the block's modulation rows."""
    inputs = [TensorSpec("timestep", (1,), "int64", 0, sizes.timesteps - 1)]
    if sizes.model.num_actions:
        inputs.append(TensorSpec("actions", (sizes.batch, sizes.block), "int64", 0, sizes.model.num_actions - 1))
    return GraphSpec("embed_time", tuple(inputs), (_modulation(sizes, sizes.block),))


def _embed_text(sizes: Sizes) -> GraphSpec:
    """Text embeddings, rows past the prompt's end zero, to each layer's cross-attention keys and values."""
    model = sizes.model
    embeds = TensorSpec("embeds", (sizes.batch, model.text_len, model.text_dim), "float32")
    return GraphSpec("embed_text", (embeds,), _text(sizes))


def _pass(sizes: Sizes, name: str) -> GraphSpec:
    """See the head of this module. rope_time: (cos, sin) of each frame's absolute index, per time pair. projections: P
    and P^-1 of each frame, as in `cfpp_rt.core.camera.Projections`.
    """
    frames = sizes.block * (2 if name == "fused" else 1)
    length = sizes.slots * sizes.tokens
    inputs = [
        TensorSpec("latents", sizes.frame_shape(frames), "float32"),
        _modulation(sizes, frames),
        TensorSpec("rope_time", (frames, sizes.time_pairs, 2), "float32"),
        TensorSpec("write_index", (sizes.batch,), "int64", 0, length - sizes.block * sizes.tokens),
    ]
    if sizes.model.camera:
        inputs.append(TensorSpec("projections", (sizes.batch, frames, 2, 4, 4), "float32"))
    if name == "fused":  # the finished block, then the noisy one; the last `block` slots are the noisy block's own
        inputs.append(TensorSpec("visible", (2, sizes.slots + sizes.block), "bool"))
    elif name == "step" or sizes.model.num_layers > 1:  # the last layer of a refresh stops at its keys and values
        inputs.append(TensorSpec("valid", (sizes.batch,), "int64", sizes.block * sizes.tokens, length))
    shape = (sizes.batch, sizes.model.num_heads, length, sizes.model.head_dim)
    caches = [TensorSpec(cache, shape, sizes.dtype) for cache in cache_names(sizes.model)]
    outputs = [TensorSpec(updated(cache.name), shape, sizes.dtype, updates=cache.name) for cache in caches]
    if name != "refresh":
        velocity = (*sizes.frame_shape(sizes.block)[:2], sizes.model.out_dim, *sizes.latent_size)
        outputs.insert(0, TensorSpec("velocity", velocity, "float32"))
    text = _text(sizes) if sizes.model.text_len else ()
    text = text[:-2] if name == "refresh" else text
    return GraphSpec(name, (*inputs, *text, *caches), tuple(outputs))


def _modulation(sizes: Sizes, frames: int) -> TensorSpec:
    return TensorSpec("modulation", (sizes.batch, frames, sizes.modulation_rows, sizes.model.dim), "float32")


def _text(sizes: Sizes) -> tuple[TensorSpec, ...]:
    model = sizes.model
    shape = (sizes.batch, model.num_heads, model.text_len, model.head_dim)
    return tuple(TensorSpec(name, shape, sizes.dtype) for name in text_names(model.num_layers))
