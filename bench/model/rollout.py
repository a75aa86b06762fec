"""Time one pass of the transformer over one latent frame, and its share of the peak matrix rate.

Runs the passes of a rollout at 480x832 (1560 tokens per latent frame) with random weights while the window fills frame
by frame: the denoising passes, without text encoder and VAE. FLOPs are those of the linear layers, of cross-attention
and of self-attention over the visible frames. The peak is a plain matrix product of the feed-forward's shape in the
same run. Peak memory is that of the process on a CPU, of the allocator on a GPU.

    python -m cfpp_rt.bench.model.rollout [--model wan-1.3b] [--device cpu] [--dtype bfloat16] [--frames 3]
        [--kv-dtype float8_e4m3]
"""

from functools import partial

import torch

from cfpp_rt.bench import harness
from cfpp_rt.bench.roofline import cached_pass_flops
from cfpp_rt.config import MODELS, RolloutConfig
from cfpp_rt.device.peak import peak_matmul_flops
from cfpp_rt.device.timing import peak_memory_mib
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import DTYPES, KV_DTYPES


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="dtype of the KV cache (default: --dtype)")
    parser.add_argument(
        "--frames", type=int, default=3, help="latent frames to generate, one pass each (default: %(default)s)"
    )
    parser.add_argument("--capacity", type=int, default=21, help="frame slots of the cache (default: %(default)s)")
    arguments = parser.parse_args()
    device, dtype, config = torch.device(arguments.device), DTYPES[arguments.dtype], MODELS[arguments.model]

    model = random_model(config, seed=0, dtype=dtype, device=str(device))
    tokens = config.tokens_per_frame(*harness.LATENT_480P)
    text = torch.randn(1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(0))
    one_pass = RolloutConfig(steps=(1000,), refresh="skip", kv_dtype=arguments.kv_dtype)  # one pass per frame
    next(Rollout(model, text, one_pass, latent_size=harness.LATENT_480P, latent_frames=1))  # warm-up
    rollout = Rollout(model, text, one_pass, latent_size=harness.LATENT_480P, latent_frames=arguments.capacity)
    peak = peak_matmul_flops(device, dtype, (tokens, config.dim, config.ffn_dim)) / 1e9
    rows = []
    print(
        f"{arguments.model} {arguments.dtype} on {device}; peak: its largest matrix product reaches {peak:.0f} GFLOP/s"
    )
    print(f"{'visible':>8} {'pass_ms':>10} {'GFLOP/s':>9} {'% of peak':>9}")
    for visible in range(1, min(arguments.frames, arguments.capacity) + 1):
        pass_ms = harness.time_synchronized(partial(next, rollout), device)
        linear, attention = cached_pass_flops(config, tokens, visible * tokens)
        rate = (linear + attention) / pass_ms / 1e6
        print(f"{visible:>8} {pass_ms:>10.1f} {rate:>9.0f} {100 * rate / peak:>9.0f}")
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
                "matrix_gflops_per_s": peak,
            }
        )
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    cache = rollout.cache.nbytes / 2**20
    peak_mib = peak_memory_mib(device)
    print(
        f"peak memory {peak_mib:.0f} MiB; weights {weights:.0f}, cache {cache:.0f} MiB of {arguments.capacity} frames"
    )
    rows.append({"bench": "rollout_memory", "peak_mib": peak_mib, "weights_mib": weights, "cache_mib": cache})
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
