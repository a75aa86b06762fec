"""`cfpp generate`: prompt, image or video in, video file out, written while it is generated."""

import argparse
import importlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.codec.wan import WanVAE
from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.core.camera import Cameras, parse_cameras
from cfpp_rt.core.frame_counts import count_frames, count_latent_frames
from cfpp_rt.device.timing import peak_memory_mib
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_writable
from cfpp_rt.io.background import BackgroundWriter
from cfpp_rt.io.contact_sheet import SheetWriter
from cfpp_rt.io.progress import progress_bar
from cfpp_rt.io.video import DEFAULT_FPS, FrameWriter, open_writer, read_image, read_video
from cfpp_rt.options import (
    DEFAULT_PRESET,
    OPTIONS,
    WORLD,
    add_option,
    add_options,
    parse_device,
    parse_preset,
    parse_size,
    refuse_unused,
    rollout_overrides,
)
from cfpp_rt.pipeline import Pipeline, choose_threads
from cfpp_rt.runtime.clip import Clip, TimedStream
from cfpp_rt.speed import quantize_linears
from cfpp_rt.values import DTYPES
from cfpp_rt.world import scripted
from cfpp_rt.world.simulator import ACTIONS

_PUBLISHED_LATENT_FRAMES = 21  # the length that the public students were trained on
_WEIGHTS = ("checkpoint", "base", "key", "config", "tiny_vae", "offload_text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  cfpp generate --checkpoint framewise-2step.pt --base Wan2.1-T2V-1.3B --prompt 'a boat at dawn' -o boat.mp4\n"
        "  cfpp generate --checkpoint causal_forcing.pt --base Wan2.1-T2V-1.3B --student framewise-4step \\\n"
        "      --image harbour.jpg --prompt 'the boats leave' -o boats.mp4\n"
        "  cfpp generate --student world --actions 'right*20,up*10,interact' -o world.mp4   # ships with the package\n"
        "  cfpp generate --random-weights --prompt anything -o noise.mp4     # needs no weights; generates noise"
    )
    source = parser.add_argument_group("weights")
    add_options(source, "--checkpoint", "--base", "--student", "--key", "--config", "--tiny-vae", "--engine")
    add_options(source, "--random-weights", "--offload-text")
    content = parser.add_argument_group("what to generate")
    add_options(content.add_mutually_exclusive_group(), "--prompt", "--prompts", "--embeds")
    add_options(content.add_mutually_exclusive_group(), "--image", "--video")
    actions = f"for a student with actions: as right*20,up*10; of the world: {', '.join(ACTIONS)}"
    add_option(content, "--actions", help=actions)
    add_options(content, "--trajectory", "--intrinsics", "--size")
    add_option(content, "--frames", help="frames of the video, 4 n + 1 (default: 81, or as many as the trajectory has)")
    content.add_argument("--seed", type=int, default=0, help="same seed, same noise, for every prompt (default: 0)")
    settings = parser.add_argument_group("how to generate it")
    add_options(settings, "--steps", "--window", "--sinks", "--refresh", "--dtype", "--kv-dtype", "--linear-dtype")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.add_argument("--device", default=device, help="default: %(default)s")
    out = parser.add_argument_group("output")
    out.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help="FILE.mp4, FILE.rgb (raw, also a named pipe) or a folder (PNG images) without frames of an earlier video",
    )
    out.add_argument("--sheet", metavar="FILE", help="also write a contact sheet of the video, a .png")
    out.add_argument("--quiet", action="store_true", help="no progress bar and no table")


def run(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed must be in 0..2**63 - 1, got {arguments.seed}")
    if arguments.engine is not None:
        # By name: `cfpp_rt.export` imports this package, not the reverse.
        bundles = importlib.import_module("cfpp_rt.export.timed_stream")
        _write_one(arguments, bundles.open_clip)
    elif arguments.student == WORLD:
        parse_device(arguments.device)
        _write_one(arguments, scripted.open_clip)
    else:
        _write_prompts(arguments)


def _write_one(arguments: argparse.Namespace, open_clip: Any) -> None:
    """Write the single clip that `open_clip` makes of the arguments."""
    output = Path(arguments.output)
    _require_writable(output, arguments.sheet)
    write_clip(open_clip(arguments), output, arguments.sheet, quiet=arguments.quiet)


def _require_writable(output: Path, sheet: str | Path | None) -> None:
    """Raise InputError for outputs that cannot be written, before the weights are read."""
    writer = open_writer(output)
    try:
        if sheet is not None:  # it may lie in the folder that the writer makes
            require_writable(sheet, "--sheet", pipe=False)
            SheetWriter(sheet, 1).abort()
    finally:
        writer.abort()


def _write_prompts(arguments: argparse.Namespace) -> None:
    """Write one clip per prompt, from a checkpoint or random weights."""
    takes = {flag.removeprefix("--").replace("-", "_") for flag in OPTIONS} - {"actions", "engine"}
    arguments.student = arguments.student or DEFAULT_PRESET
    refuse_unused(arguments, takes, f"--student {arguments.student}")
    if arguments.random_weights:
        refuse_unused(arguments, takes - set(_WEIGHTS), "--random-weights")
    config = parse_preset(arguments.student).replace(**rollout_overrides(arguments))
    cameras = parse_cameras(arguments.trajectory, arguments.intrinsics)
    num_frames = _num_frames(arguments.frames, cameras, config.frames_per_block)
    device = parse_device(arguments.device)
    prompts = _read_prompts(arguments)
    outputs = _outputs("--output", arguments.output, prompts)
    sheets = [None] * len(prompts) if arguments.sheet is None else _outputs("--sheet", arguments.sheet, prompts)
    for output, sheet in zip(outputs, sheets, strict=True):
        _require_writable(output, sheet)
    size = parse_size(arguments.size or ("64x96" if arguments.random_weights else "480x832"))
    initial_frames = _read_initial_frames(arguments, size, config)
    pipeline = _load_pipeline(arguments, device, config)
    choose_threads(pipeline, config, size)
    for prompt, output, sheet in zip(prompts, outputs, sheets, strict=True):
        stream = pipeline.stream(
            **_prompt_argument(arguments, prompt, pipeline),
            num_frames=num_frames,
            height=size[0],
            width=size[1],
            seed=arguments.seed,
            initial_frames=initial_frames,
            cameras=cameras,
            ahead=1 if device.type == "cuda" else 0,  # no input arrives meanwhile that it would delay
        )
        write_clip(Clip(stream, stream, num_frames, DEFAULT_FPS), output, sheet, quiet=arguments.quiet)
        del stream  # its cache is free again before the next begins


def write_clip(clip: Clip, output: Path, sheet: str | Path | None, *, quiet: bool) -> None:
    """Write a clip as it is generated, encoded in a thread of its own; then print the times of its stream.

    sheet: path of a contact sheet to write as well. The video is finished before the sheet, and stays if that fails.
    """
    timings = clip.stream.timings
    with ExitStack() as outputs:
        writers: list[FrameWriter] = []
        if sheet is not None:
            writers.append(outputs.enter_context(SheetWriter(sheet, clip.num_frames)))
        video = BackgroundWriter(open_writer(output, fps=clip.fps))
        with (
            video,
            progress_bar(output.name, clip.num_frames, unit="frame", enabled=not quiet) as advance,
        ):
            writers.append(video)
            for frames in clip.frames:
                with timings.outside():
                    for writer in writers:
                        writer.write(frames)
                    advance(frames.pixels.shape[1])
        seconds = time.perf_counter() - timings.started  # until the video is finished
    if not quiet:
        height, width = frames.pixels.shape[2:4]
        fps = clip.num_frames / seconds
        print(
            f"{output}: {clip.num_frames} frames of {width}x{height},"
            f" {fps / clip.fps:.2g} x real time at {clip.fps:g} fps"
        )
        print_table(
            clip.stream,
            {
                "fps": fps,
                "encode_video_ms": 1000 * video.work_s / clip.num_frames,
                "write_wait_ms": 1000 * timings.outside_s / clip.num_frames,
            },
        )


def print_table(stream: TimedStream, video: Mapping[str, float]) -> None:
    """Print the times of a stream and of its video file, one line each with its meaning.

    video: fps, encode_video_ms and write_wait_ms; they replace those of the stream.
    """
    meaning = {
        "ttff_ms": "request to first decoded frame",
        "frame_ms_p50": "interval per frame, steady state, median, without write_wait_ms",
        "frame_ms_p90": "  90th percentile",
        "frame_ms_p99": "  99th percentile",
        "fps": "frames per second, end to end, until the video is finished",
        "encode_text_ms": "text encoder, once",
        "encode_image_ms": "image or video encoder, once",
        "diffuse_ms": f"per block: all passes, {stream.rollout.config.refresh} refresh",
        "refresh_ms": "per block: clean pass",
        "decode_ms": "per block: latents to pixels",
        "encode_video_ms": "per frame: encoding and writing, in a thread beside the others",
        "write_wait_ms": "per frame: waiting until the writer takes it",
    }
    summary = {**stream.timings.summary(), **video}
    for name, text in meaning.items():
        if name in summary:
            print(f"  {name:<15}{summary[name]:>10.1f}  {text}")
    print(f"  {'peak_memory_mib':<15}{peak_memory_mib(stream.timings.device):>10.0f}  of the whole process so far")


def _num_frames(requested: int | None, cameras: Cameras | None, frames_per_block: int) -> int:
    """Return the number of frames: as many as a trajectory has, else those requested, else 81 or fewer."""
    n = frames_per_block
    latent_frames = max(_PUBLISHED_LATENT_FRAMES // n, 1) * n if cameras is None else len(cameras)
    default = count_frames(latent_frames, WanVAE.temporal_factor)
    if cameras is not None and requested not in (None, default):
        raise InputError(
            f"--frames must be {default} for a trajectory of {len(cameras)} latent frames, got {requested}"
        )
    num_frames = default if requested is None else requested
    count_latent_frames(num_frames, WanVAE.temporal_factor, n, "--frames")
    return num_frames


def _read_initial_frames(arguments: argparse.Namespace, size: tuple[int, int], config: RolloutConfig) -> Tensor | None:
    if arguments.image is not None:
        if config.frames_per_block > 1:
            raise InputError(
                f"--image is one latent frame, student {arguments.student} generates {config.frames_per_block} at a"
                " time: use a frame-wise student, or --video"
            )
        return read_image(arguments.image, *size)
    return None if arguments.video is None else read_video(arguments.video, *size)


def _prompt_argument(arguments: argparse.Namespace, prompt: str | Tensor, pipeline: Pipeline) -> dict[str, Any]:
    """Return the prompt as an argument of `Pipeline.stream`."""
    if isinstance(prompt, str) and not arguments.random_weights:
        return {"prompt": prompt}
    if isinstance(prompt, str):  # random weights come without a text encoder: the prompt seeds random embeddings
        from cfpp_rt.random_weights import random_prompt_embeds

        prompt = random_prompt_embeds(prompt, pipeline.model.config)
    return {"prompt_embeds": prompt}


def _read_prompts(arguments: argparse.Namespace) -> list[str | Tensor]:
    """Return one text, or one row of text embeddings [1, text_len, text_dim], per video."""
    if arguments.embeds is not None:
        from cfpp_rt.io.checkpoint import read_tensors

        embeds = read_tensors(arguments.embeds).get("embeds")
        if not (isinstance(embeds, Tensor) and embeds.ndim == 3 and embeds.is_floating_point() and len(embeds)):
            raise InputError(f"--embeds {arguments.embeds}: wanted a tensor 'embeds' [B, text_len, text_dim]")
        return [row[None] for row in embeds]
    if arguments.prompts is not None:
        path = Path(arguments.prompts)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split at form feeds and U+2028, too
        except UnicodeDecodeError as error:
            raise InputError(f"--prompts {path}: must be UTF-8, byte {error.start} is not") from error
        except OSError as error:
            raise InputError(f"--prompts {path}: {error.strerror}") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"--prompts {path}: wanted one prompt per line, found none")
        return [*prompts]
    if arguments.prompt is None:
        raise InputError("one of --prompt, --prompts or --embeds is needed")
    return [arguments.prompt]


def _outputs(name: str, text: str, prompts: list) -> list[Path]:
    """Return one output per prompt: `boat.mp4` for one, `boat-000.mp4`, `boat-001.mp4`, ... for several."""
    output = Path(text)
    if not output.name:
        raise InputError(f"{name} must name a file or a new folder, got {text!r}")
    if len(prompts) == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i:03d}{output.suffix}") for i in range(len(prompts))]


def _load_pipeline(arguments: argparse.Namespace, device: torch.device, config: RolloutConfig) -> Pipeline:
    dtype = DTYPES[arguments.dtype or "bfloat16"]
    if arguments.random_weights:
        from cfpp_rt.random_weights import random_pipeline

        pipeline = random_pipeline(config, dtype=dtype, device=device, camera=arguments.trajectory is not None)
        if arguments.linear_dtype is not None:
            quantize_linears(pipeline.model, arguments.linear_dtype)
        return pipeline
    if not arguments.checkpoint:
        raise InputError("--checkpoint is needed (or --random-weights to try the runtime without weights)")
    sizes = ModelConfig.from_json(arguments.config) if arguments.config is not None else None
    pipeline = Pipeline.from_pretrained(
        arguments.checkpoint,
        arguments.base,
        preset=arguments.student,
        tiny_vae=arguments.tiny_vae,
        dtype=dtype,
        device=device,
        model_config=sizes,
        key=arguments.key,
        linear_dtype=arguments.linear_dtype,
        offload_text=bool(arguments.offload_text),
    )
    pipeline.config = config
    return pipeline
