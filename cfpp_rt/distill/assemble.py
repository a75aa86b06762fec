"""Builds the stages from settings and weights."""

import copy
import dataclasses
import importlib
from pathlib import Path

import torch
from torch import Tensor

from cfpp_rt.config import ModelConfig
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.ar_diffusion import ArDiffusion, Bidirectional
from cfpp_rt.distill.batch import DataSource
from cfpp_rt.distill.causal_cd import CausalCD, Guidance, timestep_table
from cfpp_rt.distill.causal_ode import STORED_ENTRIES, CausalODE
from cfpp_rt.distill.dmd import DMD
from cfpp_rt.distill.forward import Denoiser
from cfpp_rt.distill.processes import shard, world_size
from cfpp_rt.distill.self_rollout import SelfRollout
from cfpp_rt.distill.settings import Settings, StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.errors import InputError
from cfpp_rt.io.checkpoint import read_tensors
from cfpp_rt.model.transformer import CausalWanTransformer, add_camera_branch, random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.values import DTYPES

_FROM_SCRATCH = ("base", "ar")  # stages that need no weights to start from


@dataclasses.dataclass(frozen=True)
class InitPaths:
    """Weight files that a stage starts from.

    init: the student.
    teacher: the teacher of stage cd; None = init.
    real: the bidirectional model that gives the real score of stage dmd.
    critic: initial weights of the critic of stage dmd; None = real.
    """

    init: Path | None = None
    teacher: Path | None = None
    real: Path | None = None
    critic: Path | None = None


def fresh_model(config: ModelConfig, seed: int) -> CausalWanTransformer:
    """Return an untrained float32 model: its velocity is 0, timesteps have little effect at first, cameras none."""
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
    paths: InitPaths,
    latent_size: tuple[int, int, int],
    device: torch.device | None = None,
) -> Stage:
    """Build a stage, with its networks on a device and sharded among the processes.

    Trained networks and the moving average have float32 weights; frozen networks have the settings' dtype.
    name: one of `STAGES`.
    latent_size: (C, h, w) of the clips.
    device: None = the CPU.
    Raise InputError if weights or the negative prompt are missing.
    """
    stage_settings, device = settings.stages[name], device or torch.device("cpu")
    if paths.init is None and name not in _FROM_SCRATCH:
        raise InputError(f"--init must be given for stage {name}: the weights that its student starts from")
    if name == "dmd" and paths.real is None:
        raise InputError("--real must be given for stage dmd: the bidirectional model that gives the real score")
    guidance = guidance_of(settings, stage_settings) if name in ("cd", "dmd") else None
    if stage_settings.guidance != 1 and name in ("base", "ar"):
        raise InputError(
            f"stages.{name}.guidance must be 1, since it has no teacher to guide, got {stage_settings.guidance}"
        )
    student = _trainable(settings, paths.init, settings.model, stage_settings, add_cameras=name in _FROM_SCRATCH)
    ema = copy.deepcopy(student).requires_grad_(False)
    for network in (student, ema):
        _move_and_shard(network, settings, device)
    schedule = FlowMatchSchedule(settings.rollout.shift)
    student_denoiser = _denoiser(student, settings, stage_settings)
    if name == "base":
        return Bidirectional(student_denoiser, ema, schedule=schedule)
    if name == "ar":
        return ArDiffusion(student_denoiser, ema, schedule=schedule, max_context_noise=stage_settings.context_noise)
    timesteps = timestep_table(stage_settings.table, settings.rollout.shift)
    if name == "ode":
        return CausalODE(student_denoiser, ema, schedule=schedule, timesteps=timesteps[list(STORED_ENTRIES)])
    if name == "cd":
        path = paths.teacher or paths.init
        teacher = _denoiser(load_frozen(settings, path, device), settings, stage_settings)
        target = _denoiser(ema, settings, stage_settings)
        return CausalCD(
            student_denoiser,
            target,
            teacher,
            schedule=schedule,
            timesteps=timesteps,
            guidance=guidance,
            max_context_noise=stage_settings.context_noise,
        )
    real_config = settings.real or settings.model
    critic_config = real_config if paths.critic is None else settings.model
    critic = _trainable(settings, paths.critic or paths.real, critic_config, stage_settings)
    _move_and_shard(critic, settings, device)
    return DMD(
        SelfRollout(student, settings.rollout, checkpointing=stage_settings.checkpointing),
        ema,
        _denoiser(load_frozen(settings, paths.real, device, real_config), settings, stage_settings),
        _denoiser(critic, settings, stage_settings),
        latent_frames=stage_settings.frames,
        latent_size=latent_size,
        initial_latent_frames=stage_settings.initial_frames,
        guidance=guidance,
        ratio=stage_settings.ratio,
    )


def guidance_of(settings: Settings, stage_settings: StageSettings) -> Guidance | None:
    """Return the guidance of a stage's teacher, None for weight 1. Raise InputError without the negative prompt."""
    if stage_settings.guidance == 1:
        return None
    if settings.negative is None:
        raise InputError(
            f"negative must be a file with embeds of the negative prompt for guidance {stage_settings.guidance}"
        )
    prompt_embeds = read_tensors(settings.negative).get("embeds")
    wanted = [1, settings.model.text_len, settings.model.text_dim]
    if not isinstance(prompt_embeds, Tensor) or list(prompt_embeds.shape) != wanted or not settings.model.text_len:
        got = list(prompt_embeds.shape) if isinstance(prompt_embeds, Tensor) else "none"
        raise InputError(f"negative {settings.negative}: wanted embeds {wanted} of a model with text, got {got}")
    return Guidance(stage_settings.guidance, prompt_embeds)


def load_frozen(
    settings: Settings, path: Path | None, device: torch.device | None = None, model_config: ModelConfig | None = None
) -> CausalWanTransformer:
    """Load a network that is not trained, in the settings' dtype. model_config: None = that of the settings."""
    assert path is not None
    device = device or torch.device("cpu")
    where = device if world_size() == 1 else torch.device("cpu")  # sharded networks reach the GPU block by block
    network = load_model(path, config=model_config or settings.model, dtype=DTYPES[settings.dtype], device=where)
    shard(network, DTYPES[settings.dtype])
    return network


def open_data_source(settings: Settings, stage_settings: StageSettings) -> DataSource:
    """Call `data.source`, module:function, with the stage's batch and the other keys of `data`; return the result.

    Raise InputError if the function cannot be imported or does not take these keys.
    """
    data = settings.data_of(stage_settings)
    source = data["source"]
    module, _, function = source.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"data.source must be module:function, got {source!r} ({error})") from error
    rest = {name: value for name, value in data.items() if name != "source"}
    try:
        return make(batch=stage_settings.batch, **rest)
    except TypeError as error:
        raise InputError(f"data: {error}") from error


def _trainable(
    settings: Settings,
    path: Path | None,
    model_config: ModelConfig,
    stage_settings: StageSettings,
    *,
    add_cameras: bool = False,
) -> CausalWanTransformer:
    """Load a trainable float32 network, or make an untrained one if there is no path.

    add_cameras: give weights without the camera branch one, if model_config has it.
    """
    if path is None:
        return fresh_model(model_config, stage_settings.seed).requires_grad_(True)
    if add_cameras and model_config.camera:
        model = load_model(path, config=dataclasses.replace(model_config, camera=False), dtype=torch.float32)
        model = model if model.config.camera else add_camera_branch(model)
    else:
        model = load_model(path, config=model_config, dtype=torch.float32)
    return model.requires_grad_(True)


def _move_and_shard(network: CausalWanTransformer, settings: Settings, device: torch.device) -> None:
    if world_size() == 1:
        network.to(device)
    shard(network, DTYPES[settings.dtype])


def _denoiser(network: CausalWanTransformer, settings: Settings, stage_settings: StageSettings) -> Denoiser:
    return Denoiser(network, settings.layout, checkpointing=stage_settings.checkpointing)
