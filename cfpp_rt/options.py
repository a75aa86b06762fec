"""The command-line options that several commands share: each is declared, parsed and checked here, once."""

import argparse
import re
from typing import TYPE_CHECKING, Any

from cfpp_rt.config import PRESETS, RolloutConfig
from cfpp_rt.core.camera import INTRINSICS
from cfpp_rt.errors import InputError
from cfpp_rt.values import DTYPES, KV_DTYPES, LINEAR_DTYPES

if TYPE_CHECKING:
    import torch

DEFAULT_PRESET = "framewise-2step"
WORLD = "world"  # the value of --student that names the built-in world

# Flag -> arguments of `add_argument`. An option that was not given is None or False, whatever it defaults to, so that
# `refuse_unused` can tell.
OPTIONS: dict[str, dict[str, Any]] = {
    "--checkpoint": {"metavar": "PATH", "help": "student: .pt, .safetensors, or a directory"},
    "--base": {"metavar": "DIR", "help": "Wan2.1 directory: text encoder, tokenizer and VAE"},
    "--student": {"help": f"{', '.join(PRESETS)}, {WORLD} (default: {DEFAULT_PRESET})"},
    "--key": {"help": "entry of a .pt container (default: generator_ema, else generator)"},
    "--config": {"metavar": "JSON", "help": "model sizes, where the checkpoint does not tell them"},
    "--tiny-vae": {"metavar": "FILE", "help": "decode with the tiny autoencoder (taew2_1.pth): approximate"},
    "--engine": {"metavar": "DIR", "help": "run the ONNX bundle that cfpp export onnx made, in onnxruntime"},
    "--random-weights": {"action": "store_true", "help": "a small student with random weights: it generates noise"},
    "--offload-text": {
        "action": "store_true",
        "help": "keep the text encoder (11 GB) in host memory between prompts",
    },
    "--prompt": {"metavar": "TEXT", "help": "the text"},
    "--prompts": {"metavar": "FILE", "help": "one prompt per line, UTF-8: one video each"},
    "--embeds": {"metavar": "FILE", "help": ".safetensors with 'embeds' [B, text_len, text_dim]"},
    "--image": {"metavar": "FILE", "help": "first frame; resized to --size without cropping"},
    "--video": {"metavar": "FILE", "help": "video to continue; its frames are resized likewise"},
    "--actions": {"metavar": "LIST", "help": "for a student with actions: as right*20,up*10,interact"},
    "--trajectory": {
        "metavar": "TEXT",
        "help": "camera path of a camera model: w*10,j*5 is 15 latent frames after the first",
    },
    "--intrinsics": {
        "metavar": "WHICH",
        "help": f"of the trajectory: {', '.join(INTRINSICS)}, or FX,FY by width and height (default: training)",
    },
    "--size": {"metavar": "HxW", "help": "height x width, multiples of 16 (default: 480x832)"},
    "--frames": {
        "type": int,
        "metavar": "N",
        "help": "frames of the video, in whole blocks: 4 n + 1 for Wan (default: 81)",
    },
    "--steps": {"metavar": "LIST", "help": "as 1000,500; the first block keeps the student's own"},
    "--window": {"type": int, "metavar": "N", "help": "latent frames that attention sees (default: all)"},
    "--sinks": {"type": int, "metavar": "N", "help": "first latent frames that stay visible (default: 0)"},
    "--refresh": {
        "choices": ("fused", "separate", "skip"),
        "help": "how the clean pass runs (default: fused); skip is approximate",
    },
    "--dtype": {"choices": DTYPES, "help": "of weights and cache (default: bfloat16; world: float32)"},
    "--kv-dtype": {
        "choices": KV_DTYPES,
        "help": "of the cache alone: about half its memory, approximate (default: --dtype)",
    },
    "--linear-dtype": {
        "choices": LINEAR_DTYPES,
        "help": "of the blocks' linear layers: float8_e4m3 on a GPU, int8 on a CPU; approximate (default: --dtype)",
    },
}


def add_options(group: Any, *flags: str) -> None:
    """Add shared options to a parser or an argument group, as they stand in `OPTIONS`."""
    for flag in flags:
        group.add_argument(flag, **OPTIONS[flag])


def add_option(group: Any, flag: str, **changes: Any) -> None:
    """Add one shared option with some of its arguments changed, such as its help text."""
    group.add_argument(flag, **{**OPTIONS[flag], **changes})


def refuse_unused(arguments: argparse.Namespace, takes: set[str], of: str) -> None:
    """Raise InputError if a shared option is given that is not among those that `of` takes.

    takes: option names as in `arguments`, e.g. "tiny_vae". of: what the command runs, e.g. "--student world".
    """
    for flag in OPTIONS:
        name = flag.removeprefix("--").replace("-", "_")
        if name not in takes and getattr(arguments, name, None) not in (None, False):
            raise InputError(f"{of} takes no {flag}")


def parse_size(text: str, multiple: int = 16, option: str = "--size") -> tuple[int, int]:
    """Parse HEIGHTxWIDTH to (height, width), multiples of `multiple`. Raises InputError naming the option."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(side >= multiple and side % multiple == 0 for side in size):
        raise InputError(f"{option} must be HEIGHTxWIDTH in multiples of {multiple}, got {text}")
    return size


def parse_preset(name: str) -> RolloutConfig:
    """Return the rollout settings that --student names. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"--student must be one of {', '.join(PRESETS)} or {WORLD}, got {name!r}")
    return PRESETS[name]


def parse_steps(text: str) -> tuple[int, ...]:
    """Parse denoising steps such as 1000,500. Raises InputError."""
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise InputError(f"--steps must be integers as 1000,500, got {text}")
    return tuple(int(step) for step in text.split(","))


def parse_device(name: str) -> "torch.device":
    """Parse cpu, cuda or cuda:N. Raises InputError where that is something else or cannot be used."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name}")
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def rollout_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the student's `RolloutConfig` that options change; an option may be missing altogether."""
    names = ("window", "sinks", "refresh", "kv_dtype")
    overrides = {name: getattr(arguments, name, None) for name in names}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if arguments.steps is not None:
        overrides["steps"] = parse_steps(arguments.steps)
    return overrides
