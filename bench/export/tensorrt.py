"""What does a latent frame of an engine bundle cost on this GPU, and what does it take until the first one?

Opens the bundle, rolls out with random text (or the first action) to the end of the window, or of the cache where there
is none, and times every latent frame from the host: noise, copies and steps included, codec and text encoder not.

    python -m cfpp_rt.bench.export.tensorrt BUNDLE [--library auto] [--refresh fused] [--json PATH]
"""

import argparse
import time

import numpy as np
import torch

from cfpp_rt.bench import harness
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.trt.tensorrt_runner import TensorRTRunner

STEADY = 50


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder that cfpp export tensorrt made")
    parser.add_argument("--library", default="auto", help="tensorrt, tensorrt-rtx (default: the first installed)")
    parser.add_argument("--refresh", choices=("fused", "separate"), help="default: the student's own")
    parser.add_argument("--json", metavar="PATH", help="append the rows as JSON lines")
    arguments = parser.parse_args(argv)

    begin = time.perf_counter()
    engine = TensorRTRunner(arguments.bundle, library=arguments.library)
    load_s = time.perf_counter() - begin
    sizes = engine.card.sizes
    text = (sizes.batch, sizes.model.text_len, sizes.model.text_dim)
    embeds = np.random.default_rng(0).standard_normal(text, np.float32) if sizes.model.text_len else None
    # Without a window the video ends where the cache does; with one, `STEADY` blocks more are timed at its full length.
    blocks = sizes.slots // sizes.frames_per_block + (0 if engine.card.latent_frames is not None else STEADY)
    rollout = BundleRollout(engine, embeds, latent_frames=blocks * sizes.frames_per_block, refresh=arguments.refresh)
    rows = []
    for block in range(blocks):
        begin = time.perf_counter()
        next(rollout)
        rows.append(
            {
                "bench": "tensorrt",
                "graph_sizes": [sizes.batch, *sizes.latent_size],
                "dtype": sizes.dtype,
                "steps": len(engine.card.steps if block else engine.card.first_steps),
                "refresh": rollout.config.refresh,
                "frames_per_block": sizes.frames_per_block,
                "block": block,
                "visible_frames": min((block + 1) * sizes.frames_per_block, sizes.slots),
                "load_s": load_s,
                "block_ms": 1000 * (time.perf_counter() - begin),
            }
        )
    print(f"loaded in {load_s:.2f} s, first block after {rows[0]['block_ms']:.1f} ms more")
    for row in rows[1 :: max(1, blocks // 12)]:
        print(f"block {row['block']:>4}, {row['visible_frames']:>3} frames visible: {row['block_ms']:8.2f} ms")
    harness.record(rows, arguments.json, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
