"""What `cfpp bench` measures: a student, a codec and a request, from arguments or from random weights."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.bench.latency import baseline
from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.config import MODELS, PRESETS, ModelConfig, RolloutConfig, rollout_preset
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.options import parse_device, parse_size, rollout_overrides
from cfpp_rt.pipeline import Pipeline, choose_threads, load_codec
from cfpp_rt.random_weights import SMALL, random_prompt_embeds, random_vae
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.speed import fuse_gelu, fuse_qkv, has_fused_gelu, quantize_linears
from cfpp_rt.values import DTYPES, KV_DTYPES, LINEAR_DTYPES
from cfpp_rt.world.codec import CHANNELS, PatchCodec
from cfpp_rt.world.sprites import SIZE, TILE
from cfpp_rt.world.student import load_world_pipeline

# Sizes and settings of the built-in world's student, as in configs/world.yaml.
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
PICTURES = {"small": "64x96", "world": f"{SIZE}x{SIZE}"}  # height x width, where not 480x832
DECODERS = ("none", "wan", "tiny", "world")
CONTENDERS = {
    "ours": "this runtime, as a user gets it",
    "ungraphed": "the same without CUDA graphs",
    "eager": "the published loop in plain PyTorch, same weights",
    "compiled": "that loop with its layers under torch.compile",
}


class NoDecoder:
    """A codec that decodes nothing: its pictures are single black pixels, so that a stream still counts them."""

    spatial_factor = 8
    latent_channels = 16

    def __init__(self, temporal_factor: int):
        self.temporal_factor = temporal_factor
        self._begun = False

    def decoder(self) -> "NoDecoder":
        return NoDecoder(self.temporal_factor)

    def decode(self, latents: Tensor) -> Tensor:
        batch, frames = latents.shape[:2]
        pictures = self.temporal_factor * frames - (0 if self._begun else self.temporal_factor - 1)
        self._begun = True
        return torch.full((batch, pictures, 3, 1, 1), -1.0, device=latents.device)

    def encoder(self) -> "NoDecoder":
        raise InputError("--decode none has no encoder")

    def encode(self, pixels: Tensor) -> Tensor:
        raise InputError("--decode none has no encoder")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A pipeline and the request that is put to it. frames: pictures. words: what every row of results says of it."""

    pipeline: Pipeline
    prompt: list[str] | Tensor
    frames: int
    size: tuple[int, int]
    rollout: RolloutConfig
    ahead: int
    words: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.pipeline.model.device

    @property
    def tokens(self) -> int:
        """Of one latent frame."""
        factor = self.pipeline.codec.spatial_factor
        return self.pipeline.model.config.tokens_per_frame(self.size[0] // factor, self.size[1] // factor)

    def latents(self) -> int:
        """Latent frames of a request."""
        return count_latent_frames(
            self.frames, self.pipeline.codec.temporal_factor, self.rollout.frames_per_block, "--frames"
        )

    def stream(self, contender: str, seed: int = 0) -> "Stream | baseline.EagerStream":
        """The request put to a contender, its clock running."""
        if contender in ("ours", "ungraphed"):
            given = {"prompt_embeds" if isinstance(self.prompt, Tensor) else "prompt": self.prompt}
            options: dict[str, Any] = {**given, "height": self.size[0], "width": self.size[1], "seed": seed}
            options |= {"config": self.rollout, "ahead": self.ahead, "cuda_graphs": contender == "ours"}
            return self.pipeline.stream(num_frames=self.frames, **options)
        refresh = "skip" if self.rollout.refresh == "skip" else "separate"
        factor, block = self.pipeline.codec.temporal_factor, self.rollout.frames_per_block
        return baseline.EagerStream(
            model=self.pipeline.model,
            codec=self.pipeline.codec,
            encode_prompt=self.pipeline.encode_prompt,
            prompt=self.prompt,
            config=self.rollout.replace(refresh=refresh),
            latent_frames=count_latent_frames(self.frames, factor, block),
            size=self.size,
            seed=seed,
            run_layer=_compiled_layer() if contender == "compiled" else baseline.layer,
        )


_compiled: list[Callable[..., Tensor]] = []


def _compiled_layer() -> Callable[..., Tensor]:
    """`baseline.layer` under torch.compile, one for the process: what it has compiled is kept."""
    if not _compiled:
        _compiled.append(torch.compile(baseline.layer))
    return _compiled[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("what is measured")
    source.add_argument("--checkpoint", metavar="PATH", help="student: .pt, .safetensors, or a directory")
    source.add_argument("--base", metavar="DIR", help="Wan2.1 directory: text encoder and VAE (default: random text)")
    source.add_argument("--tiny-vae", metavar="FILE", help="weights of --decode tiny (default: random)")
    source.add_argument(
        "--random-weights", action="store_true", help="no checkpoint: random weights of --model's sizes"
    )
    source.add_argument("--model", choices=SIZES, default="small", help="sizes of random weights (default: small)")
    source.add_argument(
        "--student", help=f"rollout settings: {', '.join(PRESETS)} (default: framewise-2step; the world has its own)"
    )
    source.add_argument("--decode", choices=DECODERS, help="none leaves decoding out (default: wan; world: world)")
    source.add_argument("--prompt", default="a lighthouse in a storm", help="(default: %(default)s)")
    source.add_argument("--size", metavar="HxW", help="height x width (default: 480x832; small 64x96, world 48x48)")
    source.add_argument("--frames", type=int, help="pictures of a request (default: 81; world 64)")
    source.add_argument("--batch", type=int, default=1, help="videos made together (default: 1)")
    source.add_argument("--steps", metavar="LIST", help="as 1000,500; the first block keeps the student's own")
    source.add_argument("--window", type=int, metavar="N", help="latent frames that attention sees (default: all)")
    source.add_argument("--sinks", type=int, metavar="N", help="first latent frames that stay visible (default: 0)")
    source.add_argument("--refresh", choices=("fused", "separate", "skip"), help="of ours (default: fused)")
    source.add_argument(
        "--ahead",
        type=int,
        default=0,
        help="blocks under way while one is looked at; ours only (default: 0)",
    )
    source.add_argument("--dtype", choices=DTYPES, help="(default: bfloat16 on CUDA, else float32)")
    source.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cache alone; ours only")
    source.add_argument("--linear-dtype", choices=LINEAR_DTYPES, help="of the blocks' products; ours only")
    source.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    source.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: docs/benchmark.md)")


def as_words(arguments: argparse.Namespace) -> list[str]:
    """The command-line words that give another process the same subject."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = []
    for name, default in vars(parser.parse_args([])).items():
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value != default:
            words.append(f"{option}={value}")
    return words


def build(arguments: argparse.Namespace) -> Subject:
    """Load or make everything; sets torch's number of threads. Raises InputError for what does not fit together."""
    device, world = parse_device(arguments.device), arguments.model == "world"
    if bool(arguments.checkpoint) == arguments.random_weights:
        raise InputError("--checkpoint is needed, or --random-weights, and not both")
    if not 1 <= arguments.batch <= 1024:
        raise InputError(f"--batch must be in 1..1024, got {arguments.batch}")
    if arguments.threads is not None and not 1 <= arguments.threads <= 1024:
        raise InputError(f"--threads must be in 1..1024, got {arguments.threads}")
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" and not world else "float32")]
    settings = (
        WORLD_ROLLOUT if world and arguments.student is None else rollout_preset(arguments.student or "framewise-2step")
    )
    decode = arguments.decode or ("world" if world else "wan")
    if arguments.checkpoint and world:
        pipeline = load_world_pipeline(arguments.checkpoint, dtype=dtype, device=device)
        settings = pipeline.config if arguments.student is None else settings
        if decode != "world":
            pipeline.codec = _codec(arguments, decode, dtype, device)
    else:
        codec = _codec(arguments, decode, dtype, device)
        pipeline = Pipeline(_model(arguments, dtype, device), codec, arguments.base, settings)
    if arguments.linear_dtype is not None:
        quantize_linears(pipeline.model, arguments.linear_dtype)
    rollout = dataclasses.replace(settings, **rollout_overrides(arguments))
    size = parse_size(arguments.size or PICTURES.get(arguments.model, "480x832"))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    else:
        choose_threads(pipeline, rollout, size, arguments.batch)
    frames = arguments.frames if arguments.frames is not None else (64 if world else 81)
    words = {
        "model": arguments.model if arguments.random_weights else str(arguments.checkpoint),
        "weights": "random" if arguments.random_weights else "loaded",
        "dtype": str(dtype).removeprefix("torch."),
        "kv_dtype": arguments.kv_dtype,
        "student": arguments.student or ("world-2step" if world else "framewise-2step"),
        "steps": list(rollout.steps),
        "first_steps": list(rollout.first_steps or rollout.steps),
        "size": f"{size[0]}x{size[1]}",
        "frames": frames,
        "batch": arguments.batch,
        "window": rollout.window,
        "sinks": rollout.sinks,
        "refresh": rollout.refresh,
        "decode": decode,
    }
    # Rows without these stay comparable with those of before there were any.
    words |= {name: getattr(arguments, name) for name in ("linear_dtype", "ahead") if getattr(arguments, name)}
    subject = Subject(pipeline, _prompt(arguments, pipeline), frames, size, rollout, arguments.ahead, words)
    subject.latents()  # raises where the pictures do not make whole blocks
    return subject


def _model(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device):  # type: ignore[no-untyped-def]
    """As `Pipeline.from_pretrained` and `load_world_pipeline` leave it."""
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
        raise InputError("--decode wan needs --base, or take --decode none or tiny")
    return random_vae(0, dtype, device, base_dim=8 if arguments.model in ("small", "world") else 96)


def _prompt(arguments: argparse.Namespace, pipeline: Pipeline) -> list[str] | Tensor:
    """A text where there is a text encoder, else random embeddings of the model's sizes."""
    sizes = pipeline.model.config
    if arguments.base is not None and sizes.text_len:
        pipeline.load_text_encoder()  # not part of any request's time
        return [arguments.prompt] * arguments.batch
    return random_prompt_embeds(arguments.prompt, sizes).expand(arguments.batch, -1, -1)
