"""Time loading a bundle of TensorRT engines and every latent frame of its rollout on this GPU.

Rolls the bundle out with random text embeddings (or the first action) to the end of the window, or of the cache if
there is no window. The host times every block: noise, copies and sampling steps are included, codec and text encoder
are not.

    python -m cfpp_rt.bench.export.tensorrt BUNDLE [--library auto] [--refresh fused] [--json PATH]
"""

import time

import numpy as np
import torch

from cfpp_rt.bench import harness
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.trt.tensorrt_runner import TensorRTRunner

STEADY = 50  # blocks timed at the full length of a window


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, json=True)
    parser.add_argument("bundle", help="folder written by cfpp export tensorrt")
    parser.add_argument(
        "--library", default="auto", help="tensorrt, tensorrt-rtx or auto: the first installed (default: auto)"
    )
    parser.add_argument("--refresh", choices=("fused", "separate"), help="default: the student's own")
    arguments = parser.parse_args(argv)

    begin = time.perf_counter()
    runner = TensorRTRunner(arguments.bundle, library=arguments.library)
    load_s = time.perf_counter() - begin
    sizes = runner.card.sizes
    text = (sizes.batch, sizes.model.text_len, sizes.model.text_dim)
    prompt_embeds = np.random.default_rng(0).standard_normal(text, np.float32) if sizes.model.text_len else None
    # Without a window the video ends with the cache; with one, `STEADY` more blocks are timed at its full length.
    blocks = sizes.slots // sizes.frames_per_block
    blocks += 0 if runner.card.latent_frames is not None else STEADY
    rollout = BundleRollout(
        runner, prompt_embeds, latent_frames=blocks * sizes.frames_per_block, refresh=arguments.refresh
    )
    rows = []
    for block in range(blocks):
        begin = time.perf_counter()
        next(rollout)
        rows.append(
            {
                "bench": "tensorrt",
                "graph_sizes": [sizes.batch, *sizes.latent_size],
                "dtype": sizes.dtype,
                "steps": len(runner.card.steps if block else runner.card.first_steps),
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
