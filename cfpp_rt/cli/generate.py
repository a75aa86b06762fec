"""`cfpp generate`: prompt, image or video in, video file out, written while it is being made."""

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.codec.wan import WanVAE
from cfpp_rt.config import PRESETS, ModelConfig, RolloutConfig, rollout_preset
from cfpp_rt.core.camera import INTRINSICS, Cameras, parse_cameras
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.device.timing import peak_memory_mib
from cfpp_rt.errors import InputError
from cfpp_rt.io.contact_sheet import SheetWriter
from cfpp_rt.io.video import DEFAULT_FPS, FrameWriter, open_writer, read_image, read_video
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.speed import quantize_linears
from cfpp_rt.values import DTYPES, KV_DTYPES, LINEAR_DTYPES, Frames
from cfpp_rt.world import scripted
from cfpp_rt.world.simulator import ACTIONS

DEFAULT_STUDENT = "framewise-2step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  cfpp generate --checkpoint framewise-2step.pt --base Wan2.1-T2V-1.3B --prompt 'a boat at dawn' -o boat.mp4\n"
        "  cfpp generate --checkpoint causal_forcing.pt --base Wan2.1-T2V-1.3B --student framewise-4step \\\n"
        "      --image harbour.jpg --prompt 'the boats leave' -o boats.mp4\n"
        "  cfpp generate --student world --actions 'right*20,up*10,interact' -o world.mp4   # ships with the package\n"
        "  cfpp generate --random-weights --prompt anything -o noise.mp4     # no weights needed; the picture is noise"
    )
    source = parser.add_argument_group("weights")
    source.add_argument("--checkpoint", metavar="PATH", help="student: .pt, .safetensors, or a directory")
    source.add_argument("--base", metavar="DIR", help="Wan2.1 directory: text encoder, tokenizer and VAE")
    source.add_argument("--student", help=f"{', '.join(PRESETS)}, {scripted.NAME} (default: {DEFAULT_STUDENT})")
    source.add_argument("--key", help="entry of a .pt container (default: generator_ema, else generator)")
    source.add_argument("--config", metavar="JSON", help="model sizes, where the checkpoint does not tell them")
    source.add_argument(
        "--tiny-vae", metavar="FILE", help="decode with the tiny autoencoder (taew2_1.pth): approximate"
    )
    source.add_argument(
        "--engine", metavar="DIR", help="run the ONNX bundle that cfpp export onnx made, in onnxruntime"
    )
    source.add_argument(
        "--random-weights", action="store_true", help="a small student of random weights: try the runtime, see noise"
    )
    source.add_argument(
        "--offload-text",
        action="store_true",
        default=None,
        help="keep the text encoder (11 GB) in host memory between prompts",
    )
    what = parser.add_argument_group("what to make")
    prompts = what.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="the text")
    prompts.add_argument("--prompts", metavar="FILE", help="one prompt per line, UTF-8: one video each")
    prompts.add_argument("--embeds", metavar="FILE", help=".safetensors with 'embeds' [B, text_len, text_dim]")
    given = what.add_mutually_exclusive_group()
    given.add_argument("--image", metavar="FILE", help="first picture; resized to --size without cropping")
    given.add_argument("--video", metavar="FILE", help="video to continue; its pictures are resized likewise")
    what.add_argument(
        "--actions", metavar="LIST", help=f"--student {scripted.NAME}: as right*20,up*10; {', '.join(ACTIONS)}"
    )
    what.add_argument(
        "--trajectory",
        metavar="TEXT",
        help="camera path of a camera model: w*10,j*5 is 15 latent frames after the first",
    )
    what.add_argument(
        "--intrinsics",
        metavar="WHICH",
        help=f"of the trajectory: {', '.join(INTRINSICS)}, or FX,FY by width and height (default: training)",
    )
    what.add_argument("--size", metavar="HxW", help="height x width, multiples of 16 (default: 480x832)")
    what.add_argument("--frames", type=int, help="pictures, 4 n + 1 (default: 81, or what a trajectory says)")
    what.add_argument("--seed", type=int, default=0, help="same seed, same noise, for every prompt (default: 0)")
    how = parser.add_argument_group("how to make it")
    how.add_argument("--steps", metavar="LIST", help="as 1000,500; the first block keeps the student's own")
    how.add_argument("--window", type=int, metavar="N", help="latent frames that attention sees (default: all)")
    how.add_argument("--sinks", type=int, metavar="N", help="first latent frames that stay visible (default: 0)")
    how.add_argument(
        "--refresh", choices=("fused", "separate", "skip"), help="clean pass (default: fused); skip is lossy"
    )
    how.add_argument("--dtype", choices=DTYPES, help="of weights and cache (default: bfloat16; world: float32)")
    how.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="of the cache alone: about half its memory, approximate (default: --dtype)",
    )
    how.add_argument(
        "--linear-dtype",
        choices=LINEAR_DTYPES,
        help="of the blocks' products: float8_e4m3 on a GPU, int8 on a CPU; faster, approximate (default: --dtype)",
    )
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    out = parser.add_argument_group("output")
    out.add_argument(
        "-o", "--output", required=True, metavar="PATH", help="FILE.mp4, FILE.rgb (raw) or a folder (PNG pictures)"
    )
    out.add_argument("--sheet", metavar="FILE", help="also a contact sheet of the film, a .png")
    out.add_argument("--quiet", action="store_true", help="no progress bar and no table")


def run(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed must be in 0..2**63 - 1, got {arguments.seed}")
    if arguments.engine is not None:
        _engine_film(arguments)
        return
    arguments.student = arguments.student or DEFAULT_STUDENT
    if arguments.student == scripted.NAME:
        _film(arguments)
        return
    if arguments.actions is not None:
        raise InputError(f"--actions is for --student {scripted.NAME}, got --student {arguments.student}")
    size = parse_size(arguments.size or ("64x96" if arguments.random_weights else "480x832"))
    rollout = dataclasses.replace(rollout_preset(arguments.student), **rollout_changes(arguments))
    cameras = parse_cameras(arguments.trajectory, arguments.intrinsics)
    frames = _frames(arguments.frames, cameras, rollout.frames_per_block)
    count_latent_frames(frames, WanVAE.temporal_factor, rollout.frames_per_block)
    device = parse_device(arguments.device)
    prompts = _prompts(arguments)
    outputs = _outputs("--output", arguments.output, prompts)
    sheets = [None] * len(prompts) if arguments.sheet is None else _outputs("--sheet", arguments.sheet, prompts)
    for output in outputs:  # a path that cannot be written is found before the weights are read
        open_writer(output).abort()
    initial = _initial(arguments, size, rollout)
    pipeline = _pipeline(arguments, device, rollout)
    ahead = 1 if device.type == "cuda" else 0  # nobody acts meanwhile
    for i, (output, sheet) in enumerate(zip(outputs, sheets, strict=True)):
        prompt = _prompt(arguments, prompts[i], pipeline)
        given: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_embeds": prompt}
        stream = pipeline.stream(
            **given,
            num_frames=frames,
            height=size[0],
            width=size[1],
            seed=arguments.seed,
            initial_frames=initial,
            cameras=cameras,
            ahead=ahead,
        )
        _write(stream, stream, output, sheet, frames, DEFAULT_FPS, quiet=arguments.quiet)
        del stream  # its cache is free again before the next begins


def _film(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    open_writer(output).abort()
    parse_device(arguments.device)
    stream, pictures, frames = scripted.open_scripted_stream(arguments, rollout_changes(arguments))
    _write(stream, pictures, output, arguments.sheet, frames, scripted.FPS, quiet=arguments.quiet)


def _engine_film(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    open_writer(output).abort()
    engines = importlib.import_module(
        "cfpp_rt.export.timed_stream"
    )  # by name: export knows this module, not the reverse
    stream, pictures, frames, fps = engines.open_film(arguments)
    _write(stream, pictures, output, arguments.sheet, frames, fps, quiet=arguments.quiet)


def _write(
    stream: Stream,
    pictures: Iterator[Frames],
    output: Path,
    sheet: str | Path | None,
    frames: int,
    fps: float,
    *,
    quiet: bool,
) -> None:
    """Take `frames` pictures as they are made; print the stream's times. fps: of the file."""
    with ExitStack() as stack:
        writers: list[FrameWriter] = [stack.enter_context(open_writer(output, fps=fps))]
        if sheet is not None:
            writers.append(stack.enter_context(SheetWriter(sheet, frames)))
        progress = stack.enter_context(_progress(frames, output.name, quiet))
        for part in pictures:
            for writer in writers:
                writer.write(part)
            progress(part.pixels.shape[1])
    if not quiet:
        height, width = part.pixels.shape[2:4]
        real_time = stream.timings.summary()["fps"] / fps
        print(f"{output}: {frames} frames of {width}x{height}, {real_time:.2g} x real time at {fps:g} fps")
        print_table(stream)


def _frames(wanted: int | None, cameras: Cameras | None, block: int) -> int:
    """Pictures of the video: a trajectory has one camera per latent frame; without one the whole blocks of 21."""
    latents = max(21 // block, 1) * block if cameras is None else len(cameras)
    frames = 1 + WanVAE.temporal_factor * (latents - 1)
    if wanted is None:
        return frames
    if cameras is not None and wanted != frames:
        raise InputError(f"--frames must be {frames} for a trajectory of {len(cameras)} latent frames, got {wanted}")
    return wanted


def _initial(arguments: argparse.Namespace, size: tuple[int, int], rollout: RolloutConfig) -> Tensor | None:
    if arguments.image is not None:
        if rollout.frames_per_block > 1:
            raise InputError(
                f"--image is one latent frame, student {arguments.student} makes {rollout.frames_per_block} at a time:"
                " use a frame-wise student, or --video"
            )
        return read_image(arguments.image, *size)
    return None if arguments.video is None else read_video(arguments.video, *size)


def _prompt(arguments: argparse.Namespace, prompt: str | Tensor, pipeline: Pipeline) -> str | Tensor:
    """Random weights come without a text encoder: the prompt then seeds random text embeddings."""
    if not arguments.random_weights or isinstance(prompt, Tensor):
        return prompt
    from cfpp_rt.random_weights import random_prompt_embeds

    return random_prompt_embeds(prompt, pipeline.model.config)


class _progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int, name: str, quiet: bool):
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=name, unit="frame")

    def __enter__(self) -> Callable[[int], object]:
        return self.bar.update if self.bar is not None else lambda _: None

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def print_table(stream: Stream) -> None:
    """The stream's times, one line each; what each word means stands beside it."""
    meaning = {
        "ttff_ms": "request to first decoded frame",
        "frame_ms_p50": "interval per frame, steady state, median",
        "frame_ms_p90": "  90th percentile",
        "frame_ms_p99": "  99th percentile",
        "fps": "frames per second, end to end",
        "encode_text_ms": "text encoder, once",
        "encode_image_ms": "image or video encoder, once",
        "diffuse_ms": f"per block: all passes, {stream.rollout.config.refresh} refresh",
        "refresh_ms": "per block: clean pass",
        "decode_ms": "per block: latents to pixels",
    }
    summary = stream.timings.summary()
    for name, text in meaning.items():
        if name in summary:
            print(f"  {name:<15}{summary[name]:>10.1f}  {text}")
    print(f"  {'peak_memory_mib':<15}{peak_memory_mib(stream.timings.device):>10.0f}  of the whole process so far")


def parse_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH to (height, width), or InputError."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(side >= 16 and side % 16 == 0 for side in size):
        raise InputError(f"--size must be HEIGHTxWIDTH in multiples of 16, got {text}")
    return size


def rollout_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the student's rollout that the user wants otherwise."""
    changes = {name: getattr(arguments, name) for name in ("window", "sinks", "refresh", "kv_dtype")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if arguments.steps is not None:
        if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", arguments.steps):
            raise InputError(f"--steps must be integers as 1000,500, got {arguments.steps}")
        changes["steps"] = tuple(int(step) for step in arguments.steps.split(","))
    return changes


def _prompts(arguments: argparse.Namespace) -> list[str] | list[Tensor]:
    if arguments.embeds is not None:
        from cfpp_rt.io.checkpoint import read_tensors

        embeds = read_tensors(arguments.embeds).get("embeds")
        if not (isinstance(embeds, Tensor) and embeds.ndim == 3 and embeds.is_floating_point() and len(embeds)):
            raise InputError(f"--embeds {arguments.embeds}: wanted a tensor 'embeds' [B, text_len, text_dim]")
        return [row[None] for row in embeds]
    if arguments.prompts is not None:
        path = Path(arguments.prompts)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"--prompts {path}: must be UTF-8, byte {error.start} is not") from error
        except OSError as error:
            raise InputError(f"--prompts {path}: {error.strerror}") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"--prompts {path}: wanted one prompt per line, found none")
        return prompts
    if arguments.prompt is None:
        raise InputError("one of --prompt, --prompts or --embeds is needed")
    return [arguments.prompt]


def _outputs(name: str, text: str, prompts: list) -> list[Path]:
    """One output per prompt: `boat.mp4` for one, `boat-000.mp4`, `boat-001.mp4`, ... for several."""
    output = Path(text)
    if not output.name:
        raise InputError(f"{name} must name a file or a new folder, got {text!r}")
    if len(prompts) == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i:03d}{output.suffix}") for i in range(len(prompts))]


def parse_device(name: str) -> torch.device:
    """cpu, cuda or cuda:N, or InputError where that is something else or cannot be used."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name}")
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _pipeline(arguments: argparse.Namespace, device: torch.device, rollout: RolloutConfig) -> Pipeline:
    dtype = DTYPES[arguments.dtype or "bfloat16"]
    if arguments.random_weights:
        for name in ("checkpoint", "base", "key", "config", "tiny_vae", "offload_text"):
            if getattr(arguments, name) is not None:
                raise InputError(f"--random-weights takes no --{name.replace('_', '-')}")
        from cfpp_rt.random_weights import random_pipeline

        pipeline = random_pipeline(rollout, dtype=dtype, device=device, camera=arguments.trajectory is not None)
        if arguments.linear_dtype is not None:
            quantize_linears(pipeline.model, arguments.linear_dtype)
        return pipeline
    if not arguments.checkpoint:
        raise InputError("--checkpoint is needed (or --random-weights to try the runtime without weights)")
    config = ModelConfig.from_json(arguments.config) if arguments.config is not None else None
    pipeline = Pipeline.from_pretrained(
        arguments.checkpoint,
        arguments.base,
        preset=arguments.student,
        tiny_vae=arguments.tiny_vae,
        dtype=dtype,
        device=device,
        model_config=config,
        key=arguments.key,
        linear_dtype=arguments.linear_dtype,
        offload_text=bool(arguments.offload_text),
    )
    pipeline.config = rollout
    return pipeline
