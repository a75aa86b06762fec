"""Measure what 8-bit linear layers cost in accuracy and gain in time.

Accuracy, against float32 on the same device: the published rollouts of the tests' small student (root mean square of
the latents' difference in percent of that of the latents, mean over the rollouts), and a video of the built-in world
(PSNR of the generated frames). Emulated float8 has the same codes and scales, and sums in float32.

Time: the linear layers of one 1.3B block on one frame at 480x832 (1560 tokens), and a pass over one frame, one frame
visible. Plain and 8-bit layers are timed interleaved. As in the block, the input of float8 layers comes from a norm
that has quantised it already, or from GELU, whose time counts for "ffn" of both.

    python -m cfpp_rt.bench.model.precision [--device cuda] [--layers 30] [--rounds 20] [--json PATH]
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cfpp_rt.bench import harness
from cfpp_rt.config import MODELS, ModelConfig, RolloutConfig
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import CausalWanTransformer, random_model
from cfpp_rt.model.weights import build_model
from cfpp_rt.ops.quantize_rows import quantize_rows
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed import fuse_gelu, fuse_qkv, quantize_linears
from cfpp_rt.world.student import load_world_pipeline, start

ONE_PASS = RolloutConfig(steps=(1000,), refresh="skip", window=1)
TOKENS = 1560
ACTIONS = (*[3] * 8, *[2] * 8, *[4] * 8, *[1] * 8, 5)  # of the world: around the arena, then interact
SEEDS = range(4)

Change = Callable[[CausalWanTransformer], CausalWanTransformer]


def precisions(device: torch.device) -> dict[str, tuple[torch.dtype, Change]]:
    """Return the dtype of the model by name, and the change that is then applied to it."""
    wide, narrow = torch.float32, torch.bfloat16
    emulated = partial(quantize_linears, dtype="float8_e4m3", emulated=True)
    found: dict[str, tuple[torch.dtype, Change]] = {"bfloat16": (narrow, lambda model: model)}
    found |= {"float8_e4m3 emulated": (wide, emulated), "float8_e4m3 emulated, rest bfloat16": (narrow, emulated)}
    if device.type == "cuda":
        return {**found, "float8_e4m3, rest bfloat16": (narrow, partial(quantize_linears, dtype="float8_e4m3"))}
    int8 = partial(quantize_linears, dtype="int8")
    return {**found, "int8": (wide, int8), "int8, rest bfloat16": (narrow, int8)}


def golden_rollouts(folder: Path, device: torch.device) -> Callable[[torch.dtype, Change], list[Tensor]]:
    """Return a function that runs every published rollout with the tests' student and returns its latents."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "weights.safetensors").items()}
    vectors = load_file(folder / "vectors.safetensors")
    names = [name for name, entry in meta.items() if isinstance(entry, dict) and "steps" in entry]

    def run(dtype: torch.dtype, change: Change) -> list[Tensor]:
        sizes = ModelConfig.from_dict(meta["config"])
        model = change(build_model(weights, sizes, dtype=dtype, device=str(device)))
        made = []
        for name in names:
            entry, noise, initial = meta[name], vectors[f"{name}.noise"], vectors.get(f"{name}.initial")
            settings = RolloutConfig(
                steps=tuple(entry["steps"]),
                first_steps=tuple(entry["first_chunk_steps"] or entry["steps"]),
                frames_per_block=entry["frames_per_block"],
                window=None if entry["local_attn_size"] == -1 else entry["local_attn_size"],
                sinks=entry["sink_size"],
                shift=meta["shift"],
                context_noise=entry["context_noise"],
            )
            rollout = Rollout(
                model,
                vectors["prompt_embeds"],
                settings,
                latent_size=(noise.shape[-2], noise.shape[-1]),
                latent_frames=noise.shape[1] + (0 if initial is None else initial.shape[1]),
                initial_latents=initial,
                noise=noise,
                renoise=list(vectors[f"{name}.renoise"]),
            )
            made.append(torch.cat([block.values for block in rollout], dim=1).cpu())
        return made

    return run


def world_frames(device: torch.device, dtype: torch.dtype, change: Change) -> Tensor:
    """Return the generated frames of the world, uint8 [seeds * T, 48, 48, 3]."""
    pipeline = load_world_pipeline(dtype=dtype, device=device, fuse=False)
    change(pipeline.model)
    frames = []
    for seed in SEEDS:
        stream = start(pipeline, seed, num_frames=1 + len(ACTIONS))
        next(stream)  # the initial frame, which is given
        for action in ACTIONS:
            stream.set_actions(action)
            frames.append(next(stream).pixels[0])
    return torch.cat(frames)


def rms_percent(made: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the root mean square of the difference in percent of that of `wanted`, mean over the pairs."""
    shares = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(made, wanted, strict=True)]
    return 100 * sum(shares) / len(shares)


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Return the PSNR in dB over all frames together; infinite if they are equal."""
    error = float((made.double() - wanted.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def accuracy(folder: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield one row per precision: error of the published rollouts' latents, PSNR of the world's frames."""
    run, unchanged = golden_rollouts(folder, device), (torch.float32, lambda model: model)
    latents, frames = run(*unchanged), world_frames(device, *unchanged)
    for name, changed in precisions(device).items():
        error, decibels = rms_percent(run(*changed), latents), psnr(world_frames(device, *changed), frames)
        print(f"{name:<36} error of latents {error:.2f} % rms, PSNR of the world {decibels:.1f} dB", flush=True)
        yield {"what": "accuracy", "precision": name, "latents_rms_percent": error, "world_psnr_db": decibels}


def linear_times(device: torch.device, dtype: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row per kind of linear layer of a 1.3B block: bfloat16, 8 bits, 8 bits with quantised input."""
    sizes = dataclasses.replace(MODELS["wan-1.3b"], num_layers=1)
    plain = fuse_qkv(random_model(sizes, seed=0, dtype=torch.bfloat16, device=str(device)))
    changed = quantize_linears(copy.deepcopy(plain), dtype).blocks[0]
    block = fuse_gelu(plain).blocks[0]
    for layer in ("self_attn.qkv", "self_attn.o", "ffn"):
        name, ours, eight = layer.split(".")[-1], block.get_submodule(layer), changed.get_submodule(layer)
        x = torch.randn(1, TOKENS, sizes.dim, device=device, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {"bfloat16": partial(ours, x), dtype: partial(eight, x)}
        if dtype == "float8_e4m3" and name != "o":  # the output of attention passes through no norm
            calls["quantised before"] = partial(eight, quantize_rows(x))
        with torch.inference_mode():
            times = harness.measure_interleaved(calls, device, rounds=rounds)
        text = ", ".join(f"{call} {1000 * time.median_ms:.0f} us" for call, time in times.items())
        print(f"{name:<4} on {TOKENS} tokens: {text}", flush=True)
        figures = {f"{call.replace(' ', '_')}_ms": time.median_ms for call, time in times.items()}
        yield {"what": "linear", "layer": name, "precision": dtype, **figures}


def pass_times(device: torch.device, dtype: str, layers: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the row of a pass over one frame, in bfloat16 and with 8-bit linear layers."""
    sizes = dataclasses.replace(MODELS["wan-1.3b"], num_layers=layers)
    text = torch.randn(1, sizes.text_len, sizes.text_dim, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {}
    for name in ("bfloat16", dtype):
        model = random_model(sizes, seed=0, dtype=torch.bfloat16, device=str(device))
        model = fuse_gelu(fuse_qkv(model)) if name == "bfloat16" else quantize_linears(model, dtype)
        calls[name] = partial(
            next, Rollout(model, text, ONE_PASS, latent_size=harness.LATENT_480P, latent_frames=rounds + 2)
        )
    times = harness.measure_interleaved(calls, device, rounds=rounds)
    plain, eight = (times[name].median_ms for name in calls)
    print(f"pass of {layers} layers: bfloat16 {plain:.1f} ms, {dtype} {eight:.1f} ms, {plain / eight:.2f} x")
    yield {"what": "pass", "layers": layers, "precision": dtype, "bfloat16_ms": plain, f"{dtype}_ms": eight}


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--layers", type=int, help="layers of the pass (default: 30, on a CPU 2)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--golden", type=Path, default=Path("tests/data"), help="folder of the published rollouts")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if not (arguments.golden / "vectors.safetensors").exists():
        raise InputError(f"--golden must be tests/data of a checkout, got {arguments.golden}")
    dtype = "float8_e4m3" if device.type == "cuda" else "int8"
    rows = [
        *accuracy(arguments.golden, device),
        *linear_times(device, dtype, arguments.rounds),
        *pass_times(device, dtype, arguments.layers or (30 if device.type == "cuda" else 2), arguments.rounds),
    ]
    harness.record([{"bench": "precision", **row} for row in rows], arguments.json, device)


if __name__ == "__main__":
    main()
