"""The stages put together from settings and weights."""

import copy
import dataclasses
import importlib
from pathlib import Path

import torch

from cfpp_rt.config import ModelConfig
from cfpp_rt.distill.ar_diffusion import ArDiffusion, Bidirectional
from cfpp_rt.distill.causal_cd import CausalCD, timestep_table
from cfpp_rt.distill.causal_ode import KEPT, CausalODE
from cfpp_rt.distill.dmd import DMD
from cfpp_rt.distill.forward import Denoiser
from cfpp_rt.distill.self_rollout import SelfRollout
from cfpp_rt.distill.settings import Settings, StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.distill.train import Feed
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import CausalWanTransformer, add_camera_branch, random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.schedule import FlowMatchSchedule

_FROM_NOTHING = ("base", "ar")  # what these learn does not have to be there before


@dataclasses.dataclass(frozen=True)
class Weights:
    """Files that a stage starts from. init: the student's. teacher: of stages ode and cd, default init. real: the
    bidirectional score of stage dmd, which its critic starts from too.
    """

    init: Path | None = None
    teacher: Path | None = None
    real: Path | None = None


def fresh_model(config: ModelConfig, seed: int) -> CausalWanTransformer:
    """A model that has learnt nothing: its velocity is 0, a timestep changes little at first, a camera nothing."""
    model = random_model(config, seed=seed, dtype=torch.float32)
    with torch.no_grad():
        model.head.head.weight.zero_()
        model.get_parameter("time_projection.1.weight").mul_(0.1)
        for block in model.blocks:
            block.modulation.zero_()
            if block.self_attn.prope_o is not None:
                block.self_attn.prope_o.weight.zero_()
    return model


def build_stage(name: str, settings: Settings, weights: Weights, latent_size: tuple[int, int, int]) -> Stage:
    """The stage `name` of `STAGES`. latent_size: (C, h, w) of the clips. Raises InputError for weights it lacks."""
    own = settings.stages[name]
    if weights.init is None and name not in _FROM_NOTHING:
        raise InputError(f"--init must be given for stage {name}: the weights that its student starts from")
    student = _network(settings, weights.init, own, grow=name in _FROM_NOTHING)
    ema = copy.deepcopy(student)
    student.requires_grad_(True)
    schedule = FlowMatchSchedule(settings.rollout.shift)
    learner = _denoiser(student, settings, own)
    if name == "base":
        return Bidirectional(learner, ema, schedule=schedule)
    if name == "ar":
        return ArDiffusion(learner, ema, schedule=schedule, most_context_noise=own.context_noise)
    timesteps = timestep_table(own.table, settings.rollout.shift)
    if name == "ode":
        return CausalODE(learner, ema, schedule=schedule, timesteps=timesteps[list(KEPT)])
    if name == "cd":
        teacher = _denoiser(_network(settings, weights.teacher or weights.init, own), settings, own)
        return CausalCD(learner, _denoiser(ema, settings, own), teacher, schedule=schedule, timesteps=timesteps)
    if weights.real is None:
        raise InputError("--real must be given for stage dmd: the bidirectional model whose score is the real one")
    critic = _network(settings, weights.real, own)
    real = copy.deepcopy(critic)
    return DMD(
        SelfRollout(student, settings.rollout, checkpointing=own.checkpointing),
        ema,
        _denoiser(real, settings, own),
        _denoiser(critic.requires_grad_(True), settings, own),
        frames=own.frames,
        latent_size=latent_size,
        initial_frames=own.initial_frames,
        ratio=own.ratio,
    )


def open_feed(settings: Settings, own: StageSettings) -> Feed:
    """What `data.source`, module:function, gives when called with the stage's batch and the rest of `data`."""
    source = settings.data["source"]
    module, _, function = source.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"data.source must be module:function, got {source!r} ({error})") from error
    rest = {name: value for name, value in settings.data.items() if name != "source"}
    try:
        return make(batch=own.batch, **rest)
    except TypeError as error:
        raise InputError(f"data: {error}") from error


def _network(settings: Settings, path: Path | None, own: StageSettings, *, grow: bool = False) -> CausalWanTransformer:
    """grow: weights without the camera branch may get one, where the settings' model has it."""
    if path is None:
        return fresh_model(settings.model, own.seed)
    if grow and settings.model.camera:
        model = load_model(path, config=dataclasses.replace(settings.model, camera=False), dtype=torch.float32)
        return model if model.config.camera else add_camera_branch(model)
    return load_model(path, config=settings.model, dtype=torch.float32)


def _denoiser(network: CausalWanTransformer, settings: Settings, own: StageSettings) -> Denoiser:
    return Denoiser(network, settings.layout, checkpointing=own.checkpointing)
