"""The workload of `cfpp bench`: a student, a codec and a request, from command-line options or random weights."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency import baseline
from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.config import MODELS, PRESETS, ModelConfig, RolloutConfig
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.options import (
    DEFAULT_PRESET,
    add_option,
    add_options,
    parse_device,
    parse_preset,
    parse_size,
    rollout_overrides,
)
from cfpp_rt.pipeline import Pipeline, choose_threads, load_codec
from cfpp_rt.random_weights import SMALL, random_prompt_embeds, random_vae
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.speed import fuse_gelu, fuse_qkv, has_fused_gelu, quantize_linears
from cfpp_rt.values import DTYPES
from cfpp_rt.world.codec import CHANNELS, PatchCodec
from cfpp_rt.world.sprites import SIZE, TILE
from cfpp_rt.world.student import load_world_pipeline

# ModelConfig and RolloutConfig of the built-in world's student, as in configs/world.yaml.
WORLD = ModelConfig(
    dim=128,
    ffn_dim=512,
    num_heads=2,
    num_layers=4,
    freq_dim=64,
    text_dim=1,
    text_len=0,
    num_actions=6,
    patch_size=(1, 1, 1),
)
WORLD_ROLLOUT = RolloutConfig(steps=(1000, 500), window=3)
SIZES = {**MODELS, "small": SMALL, "world": WORLD}
FRAME_SIZES = {"small": "64x96", "world": f"{SIZE}x{SIZE}"}  # height x width; all others: 480x832
DECODERS = ("none", "wan", "tiny", "world")
BACKENDS = {
    "ours": "this runtime with its defaults",
    "ungraphed": "the same without CUDA graphs",
    "eager": "the published loop in plain PyTorch, same weights",
    "compiled": "the published loop with its layers under torch.compile",
}


class NoDecoder:
    """A codec that decodes nothing: its frames are single black pixels, so that a stream still counts them."""

    spatial_factor = 8
    latent_channels = 16

    def __init__(self, temporal_factor: int):
        self.temporal_factor = temporal_factor
        self._begun = False

    def decoder(self) -> "NoDecoder":
        return NoDecoder(self.temporal_factor)

    def decode(self, latents: Tensor) -> Tensor:
        batch, latent_frames = latents.shape[:2]
        num_frames = self.temporal_factor * latent_frames - (0 if self._begun else self.temporal_factor - 1)
        self._begun = True
        return torch.full((batch, num_frames, 3, 1, 1), -1.0, device=latents.device)

    def encoder(self) -> "NoDecoder":
        raise InputError("--decode none has no encoder")

    def encode(self, pixels: Tensor) -> Tensor:
        raise InputError("--decode none has no encoder")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A pipeline and the request that is measured.

    size: height and width in pixels.
    ahead: blocks in flight while the consumer has the one before; for ours only.
    facts: what every row of results says about the workload.
    """

    pipeline: Pipeline
    prompt: list[str] | Tensor
    num_frames: int
    size: tuple[int, int]
    config: RolloutConfig
    ahead: int
    facts: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.pipeline.model.device

    @property
    def tokens(self) -> int:
        """Tokens per latent frame."""
        factor = self.pipeline.codec.spatial_factor
        return self.pipeline.model.config.tokens_per_frame(self.size[0] // factor, self.size[1] // factor)

    def latent_frames(self) -> int:
        """Return the number of latent frames of a request. Raises InputError if they do not fill complete blocks."""
        factor, block = self.pipeline.codec.temporal_factor, self.config.frames_per_block
        return count_latent_frames(self.num_frames, factor, block, "--frames")

    def stream(self, backend: str, seed: int = 0) -> "Stream | baseline.EagerStream":
        """Start the request on a backend (a key of `BACKENDS`) and return its stream, whose clock runs from now."""
        if backend in ("ours", "ungraphed"):
            given = {"prompt_embeds" if isinstance(self.prompt, Tensor) else "prompt": self.prompt}
            options: dict[str, Any] = {**given, "height": self.size[0], "width": self.size[1], "seed": seed}
            options |= {"config": self.config, "ahead": self.ahead, "cuda_graphs": backend == "ours"}
            return self.pipeline.stream(num_frames=self.num_frames, **options)
        refresh = "skip" if self.config.refresh == "skip" else "separate"
        return baseline.EagerStream(
            model=self.pipeline.model,
            codec=self.pipeline.codec,
            encode_prompt=self.pipeline.encode_prompt,
            prompt=self.prompt,
            config=self.config.replace(refresh=refresh),
            latent_frames=self.latent_frames(),
            size=self.size,
            seed=seed,
            run_layer=_compiled_layer() if backend == "compiled" else baseline.layer,
        )


_compiled: list[Callable[..., Tensor]] = []


def _compiled_layer() -> Callable[..., Tensor]:
    """Return `baseline.layer` under torch.compile, one per process, so that it compiles once."""
    if not _compiled:
        _compiled.append(torch.compile(baseline.layer))
    return _compiled[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("workload")
    add_options(source, "--checkpoint")
    add_option(source, "--base", help="Wan2.1 directory: text encoder and VAE (default: random embeddings)")
    add_option(source, "--tiny-vae", help="weights of --decode tiny (default: random)")
    add_option(source, "--random-weights", help="no checkpoint: random weights of --model")
    source.add_argument("--model", choices=SIZES, default="small", help="network of random weights (default: small)")
    presets = f"preset of the rollout: {', '.join(PRESETS)} (default: {DEFAULT_PRESET}; the world has its own)"
    add_option(source, "--student", help=presets)
    source.add_argument("--decode", choices=DECODERS, help="codec; none: no decoding (default: wan; world: world)")
    add_option(source, "--prompt", default="a lighthouse in a storm", help="text (default: %(default)s)")
    add_option(source, "--size", help="height x width (default: 480x832; small 64x96, world 48x48)")
    add_option(source, "--frames", help="frames of a request (default: 81; world 64)")
    source.add_argument("--batch", type=int, default=1, help="videos generated together (default: 1)")
    add_options(source, "--steps", "--window", "--sinks")
    add_option(source, "--refresh", help="how the clean pass of ours runs (default: fused)")
    source.add_argument(
        "--ahead",
        type=int,
        default=0,
        help="blocks in flight while the consumer has the one before; ours only (default: 0)",
    )
    add_option(source, "--dtype", help="dtype of the model (default: bfloat16 on CUDA, else float32)")
    add_option(source, "--kv-dtype", help="dtype of the KV cache; ours only")
    add_option(source, "--linear-dtype", help="8-bit dtype of the linear layers; ours only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source.add_argument("--device", default=device, help="cpu, cuda or cuda:N (default: %(default)s)")
    source.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: 1 if small, else torch's)")


def command_line(arguments: argparse.Namespace) -> list[str]:
    """Return the options that give another process the same workload."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = []
    for name, default in vars(parser.parse_args([])).items():
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is True:
            options.append(option)
        elif value != default:
            options.append(f"{option}={value}")
    return options


def build(arguments: argparse.Namespace) -> Workload:
    """Load or create the workload and set torch's number of threads.

    Raises InputError for options that do not fit together.
    """
    device, world = parse_device(arguments.device), arguments.model == "world"
    if bool(arguments.checkpoint) == arguments.random_weights:
        raise InputError("--checkpoint is needed, or --random-weights, and not both")
    if not 1 <= arguments.batch <= 1024:
        raise InputError(f"--batch must be in 1..1024, got {arguments.batch}")
    if arguments.threads is not None and not 1 <= arguments.threads <= 1024:
        raise InputError(f"--threads must be in 1..1024, got {arguments.threads}")
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" and not world else "float32")]
    config = WORLD_ROLLOUT if world and arguments.student is None else parse_preset(arguments.student or DEFAULT_PRESET)
    decode = arguments.decode or ("world" if world else "wan")
    if arguments.checkpoint and world:
        pipeline = load_world_pipeline(arguments.checkpoint, dtype=dtype, device=device)
        config = pipeline.config if arguments.student is None else config
        if decode != "world":
            pipeline.codec = _codec(arguments, decode, dtype, device)
    else:
        codec = _codec(arguments, decode, dtype, device)
        pipeline = Pipeline(_model(arguments, dtype, device), codec, arguments.base, config)
    if arguments.linear_dtype is not None:
        quantize_linears(pipeline.model, arguments.linear_dtype)
    config = dataclasses.replace(config, **rollout_overrides(arguments))
    size = parse_size(arguments.size or FRAME_SIZES.get(arguments.model, "480x832"))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    else:
        choose_threads(pipeline, config, size, arguments.batch)
    num_frames = arguments.frames if arguments.frames is not None else (64 if world else 81)
    facts = {
        "model": arguments.model if arguments.random_weights else str(arguments.checkpoint),
        "weights": "random" if arguments.random_weights else "loaded",
        "dtype": harness.dtype_name(dtype),
        "kv_dtype": arguments.kv_dtype,
        "student": arguments.student or ("world-2step" if world else DEFAULT_PRESET),
        "steps": list(config.steps),
        "first_steps": list(config.first_steps or config.steps),
        "size": f"{size[0]}x{size[1]}",
        "frames": num_frames,
        "batch": arguments.batch,
        "window": config.window,
        "sinks": config.sinks,
        "refresh": config.refresh,
        "decode": decode,
    }
    # Rows without these keys stay comparable with older rows, which never have them.
    facts |= {name: getattr(arguments, name) for name in ("linear_dtype", "ahead") if getattr(arguments, name)}
    made = Workload(pipeline, _prompt(arguments, pipeline), num_frames, size, config, arguments.ahead, facts)
    made.latent_frames()  # raises if the frames do not fill complete blocks
    return made


def _model(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device):  # type: ignore[no-untyped-def]
    """Return a model prepared like those of `Pipeline.from_pretrained` and `load_world_pipeline`."""
    if arguments.random_weights:
        model = random_model(SIZES[arguments.model], seed=0, dtype=dtype, device=str(device))
    else:
        model = load_model(arguments.checkpoint, dtype=dtype, device=device)
    if arguments.model == "world":
        fuse_qkv(model)
    if device.type == "cpu" and has_fused_gelu(device, dtype):
        fuse_gelu(model)
    return model


def _codec(arguments: argparse.Namespace, decode: str, dtype: torch.dtype, device: torch.device) -> Codec:
    world = arguments.model == "world"
    if decode == "none":
        return NoDecoder(1 if world else 4)
    if decode == "tiny":
        if arguments.tiny_vae is not None:
            return TAEHV.from_pretrained(arguments.tiny_vae, dtype=dtype, device=device)
        return TAEHV().to(device, dtype)
    if decode == "world":
        basis = torch.linalg.qr(torch.randn(3 * TILE * TILE, CHANNELS, generator=torch.Generator().manual_seed(0)))[0]
        return PatchCodec(torch.zeros(len(basis)), basis, torch.ones(CHANNELS))
    if arguments.base is not None:
        return load_codec(arguments.base, tiny_vae=None, dtype=dtype, device=device)
    if arguments.checkpoint:
        raise InputError("--decode wan needs --base; without it use --decode none or tiny")
    return random_vae(0, dtype, device, base_dim=8 if arguments.model in ("small", "world") else 96)


def _prompt(arguments: argparse.Namespace, pipeline: Pipeline) -> list[str] | Tensor:
    """Return the prompt as text if there is a text encoder, else random embeddings [B, text_len, text_dim]."""
    sizes = pipeline.model.config
    if arguments.base is not None and sizes.text_len:
        pipeline.load_text_encoder()  # before any request is timed
        return [arguments.prompt] * arguments.batch
    return random_prompt_embeds(arguments.prompt, sizes).expand(arguments.batch, -1, -1)
