"""The stages put together from settings and weights."""

import copy
import dataclasses
import importlib
from pathlib import Path

import torch
from torch import Tensor

from cfpp_rt.config import ModelConfig
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.ar_diffusion import ArDiffusion, Bidirectional
from cfpp_rt.distill.causal_cd import CausalCD, Guidance, timestep_table
from cfpp_rt.distill.causal_ode import KEPT, CausalODE
from cfpp_rt.distill.dmd import DMD
from cfpp_rt.distill.forward import Denoiser
from cfpp_rt.distill.processes import count, shard
from cfpp_rt.distill.self_rollout import SelfRollout
from cfpp_rt.distill.settings import Settings, StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.distill.train import Feed
from cfpp_rt.errors import InputError
from cfpp_rt.io.checkpoint import read_tensors
from cfpp_rt.model.transformer import CausalWanTransformer, add_camera_branch, random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.values import DTYPES

_FROM_NOTHING = ("base", "ar")  # what these learn does not have to be there before


@dataclasses.dataclass(frozen=True)
class Weights:
    """Files that a stage starts from. init: the student's. teacher: of stages ode and cd, default init. real: the
    bidirectional score of stage dmd. critic: what its critic starts from, default real.
    """

    init: Path | None = None
    teacher: Path | None = None
    real: Path | None = None
    critic: Path | None = None


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


def build_stage(
    name: str,
    settings: Settings,
    weights: Weights,
    latent_size: tuple[int, int, int],
    device: torch.device | None = None,
) -> Stage:
    """The stage `name` of `STAGES`, its networks on `device` (default: the CPU) and shared out among the processes.

    What is trained and its moving average have float32 weights; what is frozen has those of the settings' dtype.
    latent_size: (C, h, w) of the clips. Raises InputError for weights or guidance that it lacks.
    """
    own, device = settings.stages[name], device or torch.device("cpu")
    if weights.init is None and name not in _FROM_NOTHING:
        raise InputError(f"--init must be given for stage {name}: the weights that its student starts from")
    if name == "dmd" and weights.real is None:
        raise InputError("--real must be given for stage dmd: the bidirectional model whose score is the real one")
    guidance = guidance_of(settings, own) if name in ("cd", "dmd") else None
    if own.guidance != 1 and name in ("base", "ar"):
        raise InputError(f"stages.{name}.guidance must be 1, since it has no teacher to guide, got {own.guidance}")
    student = _learning(settings, weights.init, settings.model, own, grow=name in _FROM_NOTHING)
    ema = copy.deepcopy(student).requires_grad_(False)
    for network in (student, ema):
        _place(network, settings, device)
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
        path = weights.teacher or weights.init
        teacher = _denoiser(load_frozen(settings, path, device), settings, own)
        target = _denoiser(ema, settings, own)
        return CausalCD(
            learner,
            target,
            teacher,
            schedule=schedule,
            timesteps=timesteps,
            guidance=guidance,
            most_context_noise=own.context_noise,
        )
    real_sizes = settings.real or settings.model
    critic_sizes = real_sizes if weights.critic is None else settings.model
    critic = _learning(settings, weights.critic or weights.real, critic_sizes, own)
    _place(critic, settings, device)
    return DMD(
        SelfRollout(student, settings.rollout, checkpointing=own.checkpointing),
        ema,
        _denoiser(load_frozen(settings, weights.real, device, real_sizes), settings, own),
        _denoiser(critic, settings, own),
        frames=own.frames,
        latent_size=latent_size,
        initial_frames=own.initial_frames,
        guidance=guidance,
        ratio=own.ratio,
    )


def guidance_of(settings: Settings, own: StageSettings) -> Guidance | None:
    """The guidance of a stage's teacher, None for weight 1. Raises InputError where the negative prompt is missing."""
    if own.guidance == 1:
        return None
    if settings.negative is None:
        raise InputError(f"negative must be a file with embeds of the negative prompt for guidance {own.guidance}")
    embeds = read_tensors(settings.negative).get("embeds")
    wanted = [1, settings.model.text_len, settings.model.text_dim]
    if not isinstance(embeds, Tensor) or list(embeds.shape) != wanted or not settings.model.text_len:
        got = list(embeds.shape) if isinstance(embeds, Tensor) else "none"
        raise InputError(f"negative {settings.negative}: wanted embeds {wanted} of a model with text, got {got}")
    return Guidance(own.guidance, embeds)


def load_frozen(
    settings: Settings, path: Path | None, device: torch.device | None = None, sizes: ModelConfig | None = None
) -> CausalWanTransformer:
    """A network that only runs, in the settings' dtype; sizes: default those of the settings' model."""
    assert path is not None
    device = device or torch.device("cpu")
    where = device if count() == 1 else torch.device("cpu")  # sharded networks reach the GPU block by block
    network = load_model(path, config=sizes or settings.model, dtype=DTYPES[settings.dtype], device=where)
    shard(network, DTYPES[settings.dtype])
    return network


def open_feed(settings: Settings, own: StageSettings) -> Feed:
    """What `data.source`, module:function, gives when called with the stage's batch and the rest of `data`."""
    data = settings.data_of(own)
    source = data["source"]
    module, _, function = source.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"data.source must be module:function, got {source!r} ({error})") from error
    rest = {name: value for name, value in data.items() if name != "source"}
    try:
        return make(batch=own.batch, **rest)
    except TypeError as error:
        raise InputError(f"data: {error}") from error


def _learning(
    settings: Settings, path: Path | None, sizes: ModelConfig, own: StageSettings, *, grow: bool = False
) -> CausalWanTransformer:
    """grow: weights without the camera branch may get one, where the sizes have it."""
    if path is None:
        return fresh_model(sizes, own.seed).requires_grad_(True)
    if grow and sizes.camera:
        model = load_model(path, config=dataclasses.replace(sizes, camera=False), dtype=torch.float32)
        model = model if model.config.camera else add_camera_branch(model)
    else:
        model = load_model(path, config=sizes, dtype=torch.float32)
    return model.requires_grad_(True)


def _place(network: CausalWanTransformer, settings: Settings, device: torch.device) -> None:
    if count() == 1:
        network.to(device)
    shard(network, DTYPES[settings.dtype])


def _denoiser(network: CausalWanTransformer, settings: Settings, own: StageSettings) -> Denoiser:
    return Denoiser(network, settings.layout, checkpointing=own.checkpointing)
