"""Training settings: a YAML file whose keys and values are all checked."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from cfpp_rt.config import MODELS, ModelConfig, RolloutConfig
from cfpp_rt.distill.forward import Layout
from cfpp_rt.errors import InputError, MissingExtraError

STAGES = ("base", "ar", "ode", "cd", "dmd")
# Data sources whose module has another name now: configs of earlier versions must load.
_MOVED_SOURCES = {
    "cfpp_rt.distill.data.feed:open_feed": "cfpp_rt.distill.data.data_source:open_data_source",
    "cfpp_rt.world.feed:open_feed": "cfpp_rt.world.data_source:open_data_source",
}


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """Settings of one stage. Defaults are the published ones where the stages agree.

    steps: optimiser steps.
    batch: clips per process.
    lr, critic_lr: peak learning rates.
    optimizer: adamw; or muon, which is Muon at 10 times lr for the matrices of the blocks and AdamW for the rest.
    warmup: steps of linear rise of the learning rate.
    decay: share of lr at the end of a cosine; 1 = constant.
    clip: largest gradient norm.
    ema, ema_start: decay of the student's moving average, and the step at which it starts.
    guidance: guidance weight of the teacher; 1 = none, other values need `negative` in the config.
    context_noise: largest sigma on the clean frames of stages ar and cd.
    table: number of timesteps of stages ode and cd.
    ratio: critic steps per student step of stage dmd.
    frames, initial_frames: latent frames of the videos of stage dmd, and how many of them are given.
    checkpointing: activation checkpointing.
    accumulate: batches per step.
    keep: number of newest checkpoints that are kept.
    sample_every: steps between samples of the student; 0 = none.
    tensorboard: log to TensorBoard as well.
    data: data of this stage; None = that of the config.
    """

    steps: int
    batch: int = 1
    lr: float = 2e-6
    critic_lr: float = 4e-7
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    warmup: int = 0
    decay: float = 1.0
    clip: float = 10.0
    ema: float = 0.99
    ema_start: int = 0
    guidance: float = 1.0
    context_noise: float = 0.0
    table: int = 48
    ratio: int = 5
    frames: int = 21
    initial_frames: int = 0
    checkpointing: bool = False
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3
    sample_every: int = 0
    tensorboard: bool = False
    data: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "table", "ratio", "frames", "accumulate", "log_every", "save_every", "keep"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        for name in ("warmup", "ema_start", "initial_frames", "seed", "sample_every"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 2**63, "an integer >= 0")
        for name in ("lr", "critic_lr", "clip"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "a number > 0")
        for name in ("decay", "ema", "context_noise"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a number in 0..1")
        _require("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in 0..1, 1 not included")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "a number >= 0")
        _require("guidance", self.guidance, 0 <= self.guidance < float("inf"), "a number >= 0")
        _require("optimizer", self.optimizer, self.optimizer in ("adamw", "muon"), "adamw or muon")
        _require("initial_frames", self.initial_frames, self.initial_frames < self.frames, f"< frames={self.frames}")


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Settings of the sample videos that are made during training.

    codec: the Wan2.1 directory, the file of the tiny autoencoder, or module:function; None = the codec of the data
        source, and if it has none, latents are written.
    frames: latent frames of a clip; None = as many as the data have.
    initial_frames: number of latent frames that are given.
    steps: timesteps of the rollout; None = those of the config. A student of stage ar needs many.
    fps: frames per second of the video.
    """

    codec: str | None = None
    frames: int | None = None
    initial_frames: int = 0
    steps: tuple[int, ...] | None = None
    fps: float = 16.0

    def __post_init__(self) -> None:
        _require("frames", self.frames, self.frames is None or self.frames >= 1, "an integer >= 1")
        _require("initial_frames", self.initial_frames, self.initial_frames >= 0, "an integer >= 0")
        _require("fps", self.fps, 0 < self.fps <= 1000, "a number in 0..1000")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all stages of a pipeline.

    model: sizes of the student, or a name of `MODELS`.
    layout: block and window of the training clips.
    rollout: how the student will run; stage dmd runs it in the same way.
    data: `source`, module:function, and the keyword arguments that it is called with.
    stages: settings of the stages by name.
    dtype: float32 or bfloat16, the dtype of the arithmetic; trained weights are float32 in both cases.
    device: cpu, cuda, or auto (cuda if there is a GPU).
    negative: file with `embeds` [1, text_len, text_dim] of the negative prompt, for guidance.
    latent_size: (C, h, w) of the clips, needed if the data of stage dmd are prompts alone.
    real: sizes of the frozen score model of stage dmd; None = model.
    """

    model: ModelConfig
    layout: Layout
    rollout: RolloutConfig
    data: dict[str, Any]
    stages: dict[str, StageSettings]
    dtype: str = "float32"
    device: str = "auto"
    negative: str | None = None
    latent_size: tuple[int, int, int] | None = None
    real: ModelConfig | None = None
    samples: SampleSettings = dataclasses.field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        _require("dtype", self.dtype, self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        _require("device", self.device, self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")

    def data_of(self, stage_settings: StageSettings) -> dict[str, Any]:
        """Return the data settings of a stage."""
        return self.data if stage_settings.data is None else stage_settings.data

    @classmethod
    def read(cls, path: str | Path) -> "Settings":
        """Read a config. InputError names file and key of what is missing, unknown, of a wrong type or out of range."""
        try:
            import yaml
        except ImportError as error:
            raise MissingExtraError("pyyaml", "train", "reading a training config") from error
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        try:
            return cls._from(config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def _from(cls, config: Any) -> "Settings":
        names = {field.name for field in dataclasses.fields(cls)}
        _check_keys("the config", config, names, {"model", "rollout", "data", "stages"})
        _check_keys("stages", config["stages"], set(STAGES), set())
        data = _read_data("data", config["data"])
        stages = {name: _build(StageSettings, f"stages.{name}", values) for name, values in config["stages"].items()}
        for name, stage_settings in stages.items():
            if stage_settings.data is not None:
                stage_data = _read_data(f"stages.{name}.data", stage_settings.data)
                stages[name] = dataclasses.replace(stage_settings, data=stage_data)
        built = {
            "model": _read_model_config("model", config["model"]),
            "layout": _build(Layout, "layout", config.get("layout", {})),
            "rollout": _build(RolloutConfig, "rollout", config["rollout"]),
            "data": data,
            "stages": stages,
        }
        if config.get("real") is not None:
            built["real"] = _read_model_config("real", config["real"])
        if "samples" in config:
            built["samples"] = _build(SampleSettings, "samples", config["samples"])
        types_of = typing.get_type_hints(cls)
        rest = {name: _value(name, value, types_of[name]) for name, value in config.items() if name not in built}
        return cls(**{**rest, **built})


def _read_model_config(where: str, values: Any) -> ModelConfig:
    if isinstance(values, str):
        _require(where, values, values in MODELS, f"sizes or one of {', '.join(MODELS)}")
        return MODELS[values]
    return _build(ModelConfig, where, values)


def _read_data(where: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or not isinstance(data.get("source"), str):
        raise InputError(f"{where} must have a source, module:function, got {data!r}")
    return {**data, "source": _MOVED_SOURCES.get(data["source"], data["source"])}


T = TypeVar("T")


def _build(kind: type[T], where: str, values: Any) -> T:
    """Make a dataclass from a mapping whose values have the types of the fields; an integer may stand for a float."""
    types_of = typing.get_type_hints(kind)
    _check_keys(where, values, set(types_of), set())
    built = {}
    for name, value in values.items():
        built[name] = _value(f"{where}.{name}", value, types_of[name])
    try:
        return kind(**built)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None
    except InputError as error:
        raise InputError(f"{where}.{error}") from None


def _value(where: str, value: Any, wanted: Any) -> Any:
    if not _fits(value, wanted):
        text = wanted.__name__ if isinstance(wanted, type) else str(wanted)
        raise InputError(f"{where} must be {text}, got {value!r}")
    return float(value) if wanted is float else tuple(value) if isinstance(value, list) else value


def _fits(value: Any, wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inside)
    if origin is tuple:
        item_types = inside[:1] * len(value) if isinstance(value, list) and inside[-1] is Ellipsis else inside
        return isinstance(value, list) and len(value) == len(item_types) and all(map(_fits, value, item_types))
    if origin is dict:
        return isinstance(value, dict)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _check_keys(where: str, values: Any, known: set[str], required: set[str]) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a mapping, got {values!r}")
    if unknown := sorted(set(map(str, values)) - known):
        raise InputError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if missing := sorted(required - set(values)):
        raise InputError(f"{where} must have {', '.join(missing)}")


def _require(name: str, value: Any, condition: bool, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} must be {wanted}, got {value!r}")
