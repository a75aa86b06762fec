"""Sizes of models and settings of rollouts. Every derived size is a property, so no size is written twice."""

import dataclasses
import json
import math
import operator
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError

# Limits far beyond every published student: what lies outside is refused before memory or time is spent on it.
MAX_LAYERS = 1024
MAX_SIZE = 2**20  # of every other size of a model, such as its width and the length of its text
MAX_SLOTS = 2**20  # latent frames that a cache has slots for

_DIFFUSERS_NAMES = {"in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads"}


def _require_integer(owner: object, *names: str, minimum: int = 1, maximum: int | None = None) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise InputError(f"{name} must be an integer >= {minimum}, got {value!r}")
        if maximum is not None and value > maximum:
            raise InputError(f"{name} must be at most {maximum}, got {value}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a causal Wan transformer. Field names are those of the public `config.json`.

    dim: model width, num_heads * head_dim.
    ffn_dim: hidden width of the feed-forward.
    freq_dim: length of the sinusoid that embeds a timestep.
    in_dim, out_dim: channels of the latents.
    text_len, text_dim: shape of the text embeddings; text_len 0 = a model without text and without cross-attention.
    num_actions: number of discrete actions that the model knows, one per latent frame; 0 = none.
    camera: True if self-attention has the camera branch (`cfpp_rt.core.camera`).
    patch_size: (1, rows, columns) of latent pixels that make one token.
    qk_norm, cross_attn_norm: fields of public configs; only True is supported.

    num_layers is at most 1024, every other size at most 2**20.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    num_actions: int = 0
    camera: bool = False
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        sizes = ("dim", "ffn_dim", "num_heads", "freq_dim", "in_dim", "out_dim", "text_dim")
        _require_integer(self, *sizes, maximum=MAX_SIZE)
        _require_integer(self, "num_layers", maximum=MAX_LAYERS)
        _require_integer(self, "text_len", "num_actions", minimum=0, maximum=MAX_SIZE)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise InputError(f"dim must be num_heads={self.num_heads} times an even head size, got {self.dim}")
        if not isinstance(self.camera, bool):
            raise InputError(f"camera must be true or false, got {self.camera!r}")
        if self.camera and self.head_dim % 4:
            raise InputError(f"camera needs a head size that is a multiple of 4, got {self.head_dim}")
        integers = all(isinstance(side, int) and 1 <= side <= MAX_SIZE for side in self.patch_size)
        if len(self.patch_size) != 3 or not integers or self.patch_size[0] != 1:
            raise InputError(f"patch_size must be (1, rows, columns), got {self.patch_size}")
        if not isinstance(self.eps, float) or not 0 < self.eps < 1:
            raise InputError(f"eps must be a number in 0..1, got {self.eps!r}")
        if not (self.qk_norm and self.cross_attn_norm):
            raise InputError("qk_norm and cross_attn_norm must be true: every Wan2.1 checkpoint has both")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def tokens_per_frame(self, latent_height: int, latent_width: int) -> int:
        """Return the tokens T of one latent frame. Raises InputError where the patch does not divide its size."""
        _, rows, columns = self.patch_size
        if latent_height % rows or latent_width % columns or latent_height < rows or latent_width < columns:
            raise InputError(
                f"latent size must be a multiple of the patch {rows}x{columns}, got {latent_height}x{latent_width}"
            )
        return (latent_height // rows) * (latent_width // columns)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read the fields of this class from a public `config.json`, original or diffusers; ignore other fields."""
        values = {_DIFFUSERS_NAMES.get(name, name): value for name, value in values.items()}
        if "attention_head_dim" in values:
            values["dim"] = values["attention_head_dim"] * values["num_heads"]
        if values.get("qk_norm") == "rms_norm_across_heads":
            values["qk_norm"] = True
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Read a config file. Raises InputError naming the file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise InputError(f"must hold a mapping, got {type(values).__name__}")
            return cls.from_dict(values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"model config {path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}


MODELS: dict[str, ModelConfig] = {
    "wan-1.3b": ModelConfig(),
    "wan-1.3b-camera": ModelConfig(camera=True),
    "wan-14b": ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of a student's rollout; `PRESETS` holds the published ones.

    steps: denoising steps, as integers in 1..1000 of the unshifted schedule, descending, e.g. (1000, 500).
    first_steps: steps of the first generated block; None = `steps`.
    frames_per_block: latent frames that are generated together: 1 = frame-wise, 3 or 4 = chunk-wise.
    window: latent frames that a query attends to at most, its own block and the sinks included; None = all.
    sinks: first latent frames of the video, which stay visible when the window has moved on.
    shift: timestep shift of the flow-matching table.
    context_noise: timestep (0..1000) of the clean pass.
    refresh: "fused" computes the clean pass of a block in one pass with the first step of the next block: highest
        throughput. "separate" runs it as a pass of its own, with the same result: lowest latency from input to frame if
        `refresh()` is called in the idle time between frames. "skip" leaves it out, which is approximate.
    kv_dtype: dtype of keys and values: None = the model's, "float8_e4m3" = 8 bits, which takes about half the memory
        and some time per pass, and is approximate (see `KVCache`).
    """

    steps: tuple[int, ...] = (1000, 500)
    first_steps: tuple[int, ...] | None = None
    frames_per_block: int = 1
    window: int | None = None
    sinks: int = 0
    shift: float = 5.0
    context_noise: int = 0
    refresh: str = "fused"
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "first_steps"):
            steps = getattr(self, name)
            if steps is None and name == "first_steps":
                continue
            try:
                steps = tuple(operator.index(step) for step in steps)
            except TypeError:
                raise InputError(f"{name} must be descending integers in 1..1000, got {steps!r}") from None
            object.__setattr__(self, name, steps)
            descending = all(a > b for a, b in zip(steps, steps[1:], strict=False))
            if not steps or not descending or not all(1 <= step <= 1000 for step in steps):
                raise InputError(f"{name} must be descending integers in 1..1000, got {steps}")
        _require_integer(self, "frames_per_block")
        if not isinstance(self.sinks, int) or self.sinks < 0 or self.sinks % self.frames_per_block:
            raise InputError(
                f"sinks must be a multiple >= 0 of frames_per_block={self.frames_per_block}, got {self.sinks}"
            )
        if self.window is not None:
            _require_integer(self, "window")
            if self.window < self.sinks + self.frames_per_block:
                raise InputError(
                    f"window must hold the sinks and one block, >= {self.sinks + self.frames_per_block}"
                    f" frames, got {self.window}"
                )
        elif self.sinks:
            raise InputError(f"sinks need a window, got sinks={self.sinks} and window=None")
        if not 0 < self.shift < math.inf:
            raise InputError(f"shift must be a number > 0, got {self.shift}")
        if not 0 <= self.context_noise <= 1000:
            raise InputError(f"context_noise must be in 0..1000, got {self.context_noise}")
        if self.refresh not in ("fused", "separate", "skip"):
            raise InputError(f"refresh must be fused, separate or skip, got {self.refresh!r}")
        if self.kv_dtype not in (None, "float8_e4m3"):
            raise InputError(f"kv_dtype must be None or 'float8_e4m3', got {self.kv_dtype!r}")

    def replace(self, **changes: Any) -> "RolloutConfig":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


_FOUR_STEPS = (1000, 750, 500, 250)

PRESETS: dict[str, RolloutConfig] = {
    "framewise-2step": RolloutConfig(steps=(1000, 500), first_steps=_FOUR_STEPS),
    "framewise-1step": RolloutConfig(steps=(1000,), first_steps=_FOUR_STEPS),
    "framewise-4step": RolloutConfig(steps=_FOUR_STEPS),
    "chunkwise-4step": RolloutConfig(steps=_FOUR_STEPS, frames_per_block=3),
    "camera-chunkwise-4step": RolloutConfig(steps=_FOUR_STEPS, frames_per_block=4, window=20),
}


def rollout_preset(name: str) -> RolloutConfig:
    """Return the published rollout settings of a student. Raises InputError for a name not in `PRESETS`."""
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
