"""Time the decoding of a latent frame: our decoder of the Wan VAE, that of diffusers, and the tiny autoencoder.

Random weights of the published width, batch 1, the steady state of a clip (a latent frame becomes four frames), pixels
left on the device. `library` is the decoder of diffusers with its streaming state; `ours` is the same network in memory
of its own, on CUDA as a graph, and `eager` is the same without a graph; `tiny` is another, approximate network. All are
timed interleaved. FLOPs are those of the Wan VAE's convolutions. Memory is what a decoder occupies between calls,
weights not counted.

    python -m cfpp_rt.bench.model.decode [--device cpu] [--size HEIGHTxWIDTH] [--base-dim N] [--json PATH]
"""

import gc
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.bench import harness
from cfpp_rt.codec.base import StreamingDecoder
from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.codec.wan import WanVAE
from cfpp_rt.device.peak import peak_matmul_flops
from cfpp_rt.options import parse_size
from cfpp_rt.random_weights import random_vae
from cfpp_rt.values import DTYPES

BASE_DIM = 96  # width of the published VAE


def conv_flops(vae: WanVAE, decoder: StreamingDecoder, latent: Tensor) -> float:
    """Return the FLOPs of the VAE's convolutions for the next latent frame of the library's decoder."""
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


def clip_memory_gb(decoder: StreamingDecoder, latent: Tensor, device: torch.device) -> float | None:
    """Return the GB of a CUDA device that a clip's decoder occupies between calls, state and graphs; None elsewhere."""
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


def decoders_by_backend(vae: WanVAE, tiny: TAEHV, device: torch.device) -> dict[str, StreamingDecoder]:
    decoders: dict[str, StreamingDecoder] = {"library": vae.library_decoder(), "ours": vae.decoder()}
    if device.type == "cuda":
        eager = WanVAE(vae.vae, cuda_graphs=False)
        decoders["eager"] = eager.decoder()
        for codec in (vae, eager):
            _ = codec.networks  # place the weights now, so that they do not count as memory of a clip
    return {**decoders, "tiny": tiny.decoder()}


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="height x width (default: 480x832 on CUDA, else 96x160)"
    )
    parser.add_argument("--base-dim", type=int, help=f"width of the VAE (default: {BASE_DIM} on CUDA, else 32)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the decoders (default: bfloat16 on CUDA, else float32 and bfloat16)"
    )
    parser.add_argument("--rounds", type=int, default=15)
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
        decoders = decoders_by_backend(vae, tiny, device)
        memory_gb = {backend: clip_memory_gb(decoder, latent, device) for backend, decoder in decoders.items()}
        flops = conv_flops(vae, decoders["library"], latent)
        peak = peak_matmul_flops(device, dtype) / 1e12
        calls = {backend: partial(decoder.decode, latent) for backend, decoder in decoders.items()}
        times = harness.measure_interleaved(calls, device, rounds=arguments.rounds)
        print(
            f"{height}x{width}, base width {base_dim}, {name}: {flops / 1e12:.3f} TFLOP per latent frame; "
            f"peak: one large matrix product reaches {peak:.3g} TFLOP/s"
        )
        for backend, taken in times.items():
            row = {"bench": "decode", "op": backend, "shape": f"{height}x{width}", "dtype": name}
            row |= {"base_dim": base_dim, **taken.row()}
            row |= {"times_library": times["library"].median_ms / taken.median_ms, "held_gb": memory_gb[backend]}
            if backend != "tiny":
                rate = flops / taken.median_ms / 1e9
                row |= {"tflops": rate, "percent_of_roof": 100 * rate / peak}
            rows.append(row)
            share = f"{row['percent_of_roof']:>5.1f} % of peak" if backend != "tiny" else ""
            memory = "" if memory_gb[backend] is None else f"{memory_gb[backend]:>5.2f} GB"
            print(
                f"  {backend:<8}{taken.median_ms:>9.2f} ms  {row['times_library']:>6.2f} x library  {memory}  {share}"
            )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
