"""What is trained and how: a YAML file, every key of it checked."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from cfpp_rt.config import MODELS, ModelConfig, RolloutConfig
from cfpp_rt.distill.forward import Layout
from cfpp_rt.errors import InputError, MissingExtraError

STAGES = ("base", "ar", "ode", "cd", "dmd")


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """One stage. Defaults are the published ones where the stages agree.

    steps: optimiser steps. batch: clips per process. lr, critic_lr: peak learning rates. optimizer: adamw, or muon for
    the matrices of the blocks at 10 times lr and AdamW for the rest. warmup: steps of linear rise. decay: share of lr
    at the end of a cosine, 1 = constant. clip: largest gradient norm. ema: decay of the student's moving average, which
    starts at step ema_start. guidance: of the teacher, 1 = none. context_noise: largest sigma on the clean frames of
    stage ar. table: timesteps of stages ode and cd. ratio: critic steps per student step of stage dmd. frames,
    initial_frames: length of its videos, and how many of them are given. checkpointing: of activations. accumulate:
    batches per step.
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

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "table", "ratio", "frames", "accumulate", "log_every", "save_every", "keep"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        for name in ("warmup", "ema_start", "initial_frames", "seed"):
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
class Settings:
    """A whole pipeline. model: sizes, or a name of `MODELS`. layout: block and window of the clips. rollout: how the
    student will run, in stage dmd too. data: what `module:function` of `source` is called with. stages: by name.
    """

    model: ModelConfig
    layout: Layout
    rollout: RolloutConfig
    data: dict[str, Any]
    stages: dict[str, StageSettings]

    @classmethod
    def read(cls, path: str | Path) -> "Settings":
        """Raises InputError naming file and key for what is missing, unknown, of a wrong type or out of range."""
        try:
            import yaml
        except ImportError as error:
            raise MissingExtraError("pyyaml", "train", "reading a training config") from error
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        try:
            return cls._from(found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def _from(cls, found: Any) -> "Settings":
        names = {field.name for field in dataclasses.fields(cls)}
        _check_keys("the config", found, names, names - {"layout"})
        model, data, stages = found["model"], found["data"], found["stages"]
        if isinstance(model, str):
            _require("model", model, model in MODELS, f"sizes or one of {', '.join(MODELS)}")
        if not isinstance(data, dict) or not isinstance(data.get("source"), str):
            raise InputError(f"data must hold a source, module:function, got {data!r}")
        _check_keys("stages", stages, set(STAGES), set())
        return cls(
            MODELS[model] if isinstance(model, str) else _build(ModelConfig, "model", model),
            _build(Layout, "layout", found.get("layout", {})),
            _build(RolloutConfig, "rollout", found["rollout"]),
            data,
            {name: _build(StageSettings, f"stages.{name}", values) for name, values in stages.items()},
        )


T = TypeVar("T")


def _build(kind: type[T], where: str, values: Any) -> T:
    """A dataclass from a mapping whose values have the fields' types; numbers of YAML may be integers for floats."""
    types_of = typing.get_type_hints(kind)
    _check_keys(where, values, set(types_of), set())
    built = {}
    for name, value in values.items():
        wanted = types_of[name]
        if not _fits(value, wanted):
            text = wanted.__name__ if isinstance(wanted, type) else str(wanted)
            raise InputError(f"{where}.{name} must be {text}, got {value!r}")
        built[name] = float(value) if wanted is float else tuple(value) if isinstance(value, list) else value
    try:
        return kind(**built)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None
    except InputError as error:
        raise InputError(f"{where}.{error}") from None


def _fits(value: Any, wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inside)
    if origin is tuple:
        every = inside[:1] * len(value) if isinstance(value, list) and inside[-1] is Ellipsis else inside
        return isinstance(value, list) and len(value) == len(every) and all(map(_fits, value, every))
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _check_keys(where: str, found: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{where} must be a mapping, got {found!r}")
    if unknown := sorted(set(map(str, found)) - known):
        raise InputError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if missing := sorted(needed - set(found)):
        raise InputError(f"{where} must have {', '.join(missing)}")


def _require(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {wanted}, got {value!r}")
