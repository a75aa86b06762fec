"""What does decoding a latent frame cost: our decoder of the Wan VAE, diffusers' own, and the tiny autoencoder?

Random weights at the published width, batch 1, a clip's steady state (a latent frame becomes four pictures), pixels
left on the device. `library` is diffusers' decoder with its streaming state, `ours` the same network in memory of its
own (on CUDA as a graph; `eager` is the same without), `tiny` the approximate option, another network. All take turns.
FLOPs are those of the Wan VAE's convolutions; memory is what a contender holds between calls, weights not counted.

    python -m cfpp_rt.bench.model.decode [--device cpu] [--size HEIGHTxWIDTH] [--base-dim N] [--json PATH]
"""

import argparse
import gc
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.bench import harness
from cfpp_rt.codec.base import StreamingDecoder
from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.codec.wan import WanVAE
from cfpp_rt.options import parse_size
from cfpp_rt.random_weights import random_vae
from cfpp_rt.values import DTYPES

BASE_DIM = 96  # of the published VAE


def conv_flops(vae: WanVAE, decoder: StreamingDecoder, latent: Tensor) -> float:
    """FLOPs of the VAE's convolutions for the library decoder's next latent frame."""
    total = 0.0

    def count(conv: Any, _: object, out: Tensor) -> None:
        nonlocal total
        total += 2.0 * out.numel() * conv.weight[0].numel()

    convs = [m for m in vae.vae.decoder.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    decoder.decode(latent)
    for hook in hooks:
        hook.remove()
    return total


def held_by(decoder: StreamingDecoder, latent: Tensor, device: torch.device) -> float | None:
    """GB that a decoder under way keeps on a CUDA device, state and graphs; None elsewhere."""
    if device.type != "cuda":
        for _ in range(2):
            decoder.decode(latent)
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    for _ in range(2):
        decoder.decode(latent)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return (torch.cuda.memory_reserved(device) - before) / 1e9


def contenders(vae: WanVAE, tiny: TAEHV, device: torch.device) -> dict[str, StreamingDecoder]:
    found: dict[str, StreamingDecoder] = {"library": vae.library_decoder(), "ours": vae.decoder()}
    if device.type == "cuda":
        eager = WanVAE(vae.vae, cuda_graphs=False)
        found["eager"] = eager.decoder()
        for codec in (vae, eager):
            _ = codec.networks  # places the weights, which are not to count as a clip's memory
    return {**found, "tiny": tiny.decoder()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=parse_size, help="HEIGHTxWIDTH (default: 480x832 on CUDA, else 96x160)")
    parser.add_argument("--base-dim", type=int, help=f"width of the VAE (default: {BASE_DIM} on CUDA, else 32)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32 and bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="PATH", help="append the rows as JSON lines")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    height, width = arguments.size or ((480, 832) if cuda else (96, 160))
    base_dim = arguments.base_dim or (BASE_DIM if cuda else 32)
    dtypes = [arguments.dtype] if arguments.dtype else ["bfloat16"] if cuda else ["float32", "bfloat16"]
    rows: list[dict[str, Any]] = []
    for name in dtypes:
        dtype = DTYPES[name]
        vae = random_vae(0, dtype, device, base_dim=base_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny = TAEHV().to(device, dtype)
            latent = torch.randn(1, 1, vae.latent_channels, height // 8, width // 8).to(device)
        decoders = contenders(vae, tiny, device)
        held = {contender: held_by(decoder, latent, device) for contender, decoder in decoders.items()}
        flops = conv_flops(vae, decoders["library"], latent)
        roof = harness.matrix_roof(device, dtype)
        calls = {contender: partial(decoder.decode, latent) for contender, decoder in decoders.items()}
        times = harness.measure_in_turns(calls, device, rounds=arguments.rounds)
        print(f"{height}x{width}, base width {base_dim}, {name}: {flops / 1e12:.3f} TFLOP a latent frame")
        for contender, taken in times.items():
            row = {"bench": "decode", "op": contender, "shape": f"{height}x{width}", "dtype": name}
            row |= {"base_dim": base_dim, "ms": taken.median_ms, "p10_ms": taken.p10_ms, "p90_ms": taken.p90_ms}
            row |= {"times_library": times["library"].median_ms / taken.median_ms, "held_gb": held[contender]}
            if contender != "tiny":
                rate = flops / taken.median_ms / 1e9
                row |= {"tflops": rate, "percent_of_roof": 100 * rate / roof}
            rows.append(row)
            share = f"{row['percent_of_roof']:>5.1f} % of a matrix product's rate" if contender != "tiny" else ""
            memory = "" if held[contender] is None else f"{held[contender]:>5.2f} GB"
            print(
                f"  {contender:<8}{taken.median_ms:>9.2f} ms  {row['times_library']:>6.2f} x library  {memory}  {share}"
            )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
