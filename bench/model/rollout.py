"""How long does one frame pass of the transformer take, and what share of the matrix rate does it reach?

Runs the rollout's own passes at 480x832 (1560 tokens per latent frame) with random weights, window filled frame by
frame: the denoising passes of a frame, without text encoder and VAE. FLOPs are those of the linear layers, of
cross-attention and of self-attention over the visible frames. The roof is a plain matrix product of the feed-forward's
shape, measured in the same run. Peak memory is that of the whole process on the CPU, of the allocator on a GPU.

    python -m cfpp_rt.bench.model.rollout [--model wan-1.3b] [--device cpu] [--dtype bfloat16] [--frames 3]
        [--kv-dtype float8_e4m3]
"""

import argparse
import time

import torch

from cfpp_rt.bench import harness
from cfpp_rt.bench.roofline import matrix_rate, pass_flops
from cfpp_rt.config import MODELS, RolloutConfig
from cfpp_rt.device.timing import peak_memory_mib
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import DTYPES, KV_DTYPES

LATENT = (60, 104)  # 480x832


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cache; default: --dtype")
    parser.add_argument("--frames", type=int, default=3, help="latent frames to make, one pass each")
    parser.add_argument(
        "--capacity", type=int, default=21, help="frame slots of the cache, as a user would allocate it"
    )
    parser.add_argument("--json", metavar="PATH", help="append the rows as JSON lines")
    arguments = parser.parse_args()
    device, dtype, config = torch.device(arguments.device), DTYPES[arguments.dtype], MODELS[arguments.model]

    model = random_model(config, seed=0, dtype=dtype, device=str(device))
    tokens = config.tokens_per_frame(*LATENT)
    text = torch.randn(1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(0))
    one_pass = RolloutConfig(
        steps=(1000,), refresh="skip", kv_dtype=arguments.kv_dtype
    )  # one pass a frame: what is timed is the pass
    next(Rollout(model, text, one_pass, latent_size=LATENT, latent_frames=1))  # warm-up
    rollout = Rollout(model, text, one_pass, latent_size=LATENT, latent_frames=arguments.capacity)
    roof = matrix_rate(config, tokens, dtype, device)
    rows = []
    print(f"{arguments.model} {arguments.dtype} on {device}: matrix rate {roof:.0f} GFLOP/s")
    print(f"{'visible':>8} {'pass_ms':>10} {'GFLOP/s':>9} {'% of roof':>9}")
    for visible in range(1, min(arguments.frames, arguments.capacity) + 1):
        harness.synchronize(device)
        begin = time.perf_counter()
        next(rollout)
        harness.synchronize(device)
        pass_ms = 1000 * (time.perf_counter() - begin)
        linear, attention = pass_flops(config, tokens, visible * tokens)
        rate = (linear + attention) / pass_ms / 1e6
        print(f"{visible:>8} {pass_ms:>10.1f} {rate:>9.0f} {100 * rate / roof:>9.0f}")
        rows.append(
            {
                "bench": "rollout",
                "model": arguments.model,
                "dtype": arguments.dtype,
                "kv_dtype": arguments.kv_dtype or arguments.dtype,
                "visible_frames": visible,
                "pass_ms": pass_ms,
                "linear_gflop": linear / 1e9,
                "attention_gflop": attention / 1e9,
                "gflops_per_s": rate,
                "matrix_gflops_per_s": roof,
            }
        )
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    cache = rollout.cache.nbytes / 2**20
    peak = peak_memory_mib(device)
    print(f"peak memory {peak:.0f} MiB; weights {weights:.0f}, cache {cache:.0f} MiB of {arguments.capacity} frames")
    rows.append({"bench": "rollout_memory", "peak_mib": peak, "weights_mib": weights, "cache_mib": cache})
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
