"""The contract of the exported graphs: names, shapes, dtypes and ranges of all inputs and outputs.

Exporter, verifier, TensorRT builder and runners all read the contract here. A bundle is made for one size: every
dimension is a number, because a cache that is updated in place needs a static length, and engines of static shape build
fast. Each pass takes only small inputs from the host; caches and text keys and values stay bound.

The passes write a block's keys and values into its frame slots by TensorScatter, and the updated cache is the input of
one Attention per layer:

    step     one block; it attends to the first `valid` tokens of the cache. A ring that has wrapped is full, and
             attention does not depend on the order of keys, so one integer, the visible length, describes it, with a
             window and sinks too.
    refresh  the same for a finished block of which only keys and values are needed; it has no velocity.
    fused    a finished block and the first step of the next one. Only the finished block is written. The keys of the
             noisy block are appended for this pass only, because the next pass over that block computes them again. So
             the ring needs no spare slot. `visible` marks the columns that the queries of each block attend to.

A model with the camera branch has a second pair of caches per layer, in the same slots, and takes P and P^-1 of every
latent frame of a pass (`projections`).

Caches start as zeros: attention weights invisible keys with 0, and the product is 0 only for finite values.

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
DECODERS, ENCODER = ("decode_first", "decode_next"), "encode"  # the codec's graphs, which the card declares
_CARD_KEYS = {"frames_per_block": "block", "num_timesteps": "timesteps"}  # field of `Sizes` -> key in card.json


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    dtype: a numpy name, or bfloat16.
    low, high: inclusive range of an integer input.
    updates: for an output, the name of the input that it is the updated version of. Binding the same memory to both
        must be correct, and the input is never read after the update.
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
        """Name of each updating output -> name of the input that it updates."""
        return {tensor.name: tensor.updates for tensor in self.outputs if tensor.updates is not None}

    def input(self, name: str) -> TensorSpec:
        return next(tensor for tensor in self.inputs if tensor.name == name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GraphSpec":
        """Return the spec that `dataclasses.asdict` turned into JSON values."""
        inputs, outputs = (
            tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in values[side])
            for side in ("inputs", "outputs")
        )
        return cls(values["name"], inputs, outputs)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers that determine all shapes.

    batch: videos generated together.
    latent_size: (h, w).
    frames_per_block: latent frames generated together ("block" in the card).
    sinks, ring: frame slots of the cache; see `FrameRing`.
    num_timesteps: number of distinct timesteps that the rollout uses ("timesteps" in the card's sizes); the card lists
        them.
    dtype: dtype of weights and caches, one of `FLOATS`.
    """

    model: ModelConfig
    batch: int
    latent_size: tuple[int, int]
    frames_per_block: int
    sinks: int
    ring: int
    num_timesteps: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise InputError(f"dtype must be one of {', '.join(FLOATS)}, got {self.dtype!r}")
        for name in ("batch", "frames_per_block", "ring", "num_timesteps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}")
        self.model.tokens_per_frame(*self.latent_size)  # raises where the patch does not fit

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, under the names that cards use."""
        return {_CARD_KEYS.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Sizes":
        """Return the sizes that `to_dict` wrote. Raises KeyError, TypeError or InputError for other values."""
        names = {key: name for name, key in _CARD_KEYS.items()}
        sizes = {names.get(name, name): value for name, value in values.items()}
        model, latent_size = ModelConfig.from_dict(sizes["model"]), tuple(sizes["latent_size"])
        return cls(**{**sizes, "model": model, "latent_size": latent_size})

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.model.tokens_per_frame(*self.latent_size)

    @property
    def slots(self) -> int:
        """Capacity of the cache in latent frames."""
        return self.sinks + self.ring

    @property
    def time_pairs(self) -> int:
        """Channel pairs of a head that are rotated by the latent frame index; row and column rotate the others."""
        return pairs_of(self.model.head_dim)[0]

    @property
    def modulation_rows(self) -> int:
        """Rows of `modulation`: shift, 1 + scale, gate, shift, 1 + scale, gate of each layer; shift, 1 + scale of the
        head.
        """
        return 6 * self.model.num_layers + 2

    def frame_shape(self, frames: int) -> tuple[int, ...]:
        """Shape of the latents of `frames` latent frames: (B, frames, C, h, w)."""
        return (self.batch, frames, self.model.in_dim, *self.latent_size)


def caches_of_layer(model: ModelConfig, layer: int) -> list[str]:
    """Return the names of a layer's caches: keys, values, and those of the camera branch where the model has one."""
    kinds = ("keys", "values", "camera_keys", "camera_values")
    return [f"{kind}.{layer}" for kind in kinds[: 4 if model.camera else 2]]


def cache_names(model: ModelConfig) -> list[str]:
    """Return the names of all caches, layer by layer."""
    return [name for layer in range(model.num_layers) for name in caches_of_layer(model, layer)]


def text_names(layers: int) -> list[str]:
    """Return the names of the text's keys and values, layer by layer."""
    return [f"text_{kind}.{layer}" for layer in range(layers) for kind in ("keys", "values")]


def updated(name: str) -> str:
    """Return the name of the output that updates the input `name`."""
    return f"{name}.updated"


def network_graphs(sizes: Sizes) -> dict[str, GraphSpec]:
    """Return the transformer's graphs by name: embed_time, embed_text (for a model with text) and the `PASSES`."""
    graphs = [_embed_time(sizes), *([_embed_text(sizes)] if sizes.model.text_len else [])]
    graphs += [_pass(sizes, name) for name in PASSES]
    return {graph.name: graph for graph in graphs}


def _embed_time(sizes: Sizes) -> GraphSpec:
    """Return the graph from a timestep (its index in the card's list) and a block's actions to its modulation rows."""
    inputs = [TensorSpec("timestep", (1,), "int64", 0, sizes.num_timesteps - 1)]
    if sizes.model.num_actions:
        shape = (sizes.batch, sizes.frames_per_block)
        inputs.append(TensorSpec("actions", shape, "int64", 0, sizes.model.num_actions - 1))
    return GraphSpec("embed_time", tuple(inputs), (_modulation(sizes, sizes.frames_per_block),))


def _embed_text(sizes: Sizes) -> GraphSpec:
    """Return the graph from prompt embeddings, zero past the prompt's end, to cross-attention keys and values."""
    model = sizes.model
    prompt_embeds = TensorSpec("embeds", (sizes.batch, model.text_len, model.text_dim), "float32")
    return GraphSpec("embed_text", (prompt_embeds,), _text(sizes))


def _pass(sizes: Sizes, name: str) -> GraphSpec:
    """Return the graph of one of the `PASSES`, see the head of this module.

    rope_time: (cos, sin) of each latent frame's absolute index, per time pair.
    projections: P and P^-1 of each latent frame, as in `cfpp_rt.core.camera`.
    """
    n = sizes.frames_per_block
    frames = n * (2 if name == "fused" else 1)
    length = sizes.slots * sizes.tokens_per_frame
    inputs = [
        TensorSpec("latents", sizes.frame_shape(frames), "float32"),
        _modulation(sizes, frames),
        TensorSpec("rope_time", (frames, sizes.time_pairs, 2), "float32"),
        TensorSpec("write_index", (sizes.batch,), "int64", 0, length - n * sizes.tokens_per_frame),
    ]
    if sizes.model.camera:
        inputs.append(TensorSpec("projections", (sizes.batch, frames, 2, 4, 4), "float32"))
    if (
        name == "fused"
    ):  # rows: the finished block, the noisy block; the last n columns are the noisy block's appended keys
        inputs.append(TensorSpec("visible", (2, sizes.slots + n), "bool"))
    elif name == "step" or sizes.model.num_layers > 1:  # the last layer of a refresh stops at keys and values
        inputs.append(TensorSpec("valid", (sizes.batch,), "int64", n * sizes.tokens_per_frame, length))
    shape = (sizes.batch, sizes.model.num_heads, length, sizes.model.head_dim)
    caches = [TensorSpec(cache, shape, sizes.dtype) for cache in cache_names(sizes.model)]
    outputs = [TensorSpec(updated(cache.name), shape, sizes.dtype, updates=cache.name) for cache in caches]
    if name != "refresh":
        velocity = (sizes.batch, n, sizes.model.out_dim, *sizes.latent_size)
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
