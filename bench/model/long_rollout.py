"""Check that time per frame and memory stay constant in a long rollout.

Rolls a small network out over 2,000 latent frames with a window of 6 frames and 1 sink, 2 steps and the fused refresh.
The last 100 frames are compared with the first 100 after the window has filled. Since the speed of a busy machine
drifts within a minute, those first 100 are generated once more by a fresh rollout, interleaved with the last 100 of the
long one: that ratio is the reliable one. `--plot` draws time and memory.

    python -m cfpp_rt.bench.model.long_rollout [--frames 2000] [--device cpu] [--json PATH] [--plot PNG]
"""

import statistics
import time

import torch

from cfpp_rt.bench import harness
from cfpp_rt.config import RolloutConfig
from cfpp_rt.model.transformer import random_model
from cfpp_rt.random_weights import SMALL, random_prompt_embeds
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import Latents

WINDOW, SINKS, STEADY, SPAN = 6, 1, 20, 100


def memory_mib(device: torch.device) -> float:
    """Return the memory in use: of the allocator on a GPU, the resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def timed_frame(rollout: Rollout) -> tuple[float, Latents]:
    """Return the ms of one frame, the device's queue included, and the frame."""
    begin = time.perf_counter()
    block = next(rollout)
    harness.synchronize(block.values.device)
    return 1000 * (time.perf_counter() - begin), block


def plot(times: list[float], memory: list[float], path: str) -> None:
    """Write a figure of the ms and the MiB of every latent frame as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 4.2), sharex=True, constrained_layout=True)
    frames = range(len(times))
    upper.plot(frames, times, ".", markersize=1.5, color="#9db7d5", label="each frame")
    medians = [statistics.median(times[i : i + SPAN]) for i in range(0, len(times), SPAN)]
    edges = [*range(0, len(times), SPAN), len(times)]
    upper.step(edges, [*medians, medians[-1]], where="post", color="#1f4e79", label="median of 100")
    upper.set(ylabel="ms per latent frame", ylim=(0, 2 * statistics.median(times)))
    upper.legend(loc="upper right", frameon=False)
    lower.plot(frames, memory, color="#1f4e79")
    lower.set(ylabel="resident MiB", xlabel="latent frame", ylim=(0, 1.25 * max(memory)), xlim=(0, len(times)))
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--frames", type=int, default=2000, help="latent frames (default: %(default)s)")
    parser.add_argument("--plot", metavar="PNG", help="write a figure of time and memory against frames")
    arguments = parser.parse_args()
    if arguments.frames < STEADY + 2 * SPAN:
        parser.error(f"--frames must be at least {STEADY + 2 * SPAN}, got {arguments.frames}")
    device = torch.device(arguments.device)

    model = random_model(SMALL, seed=0, dtype=torch.float32, device=str(device))

    def start() -> Rollout:
        config = RolloutConfig(window=WINDOW, sinks=SINKS)
        return Rollout(
            model, random_prompt_embeds("a long walk", SMALL), config, latent_size=(8, 12), latent_frames=None
        )

    rollout, fresh = start(), start()
    for _ in range(STEADY):
        next(fresh)
    times, memory, paired, finite = [], [], [], True
    for frame in range(arguments.frames):
        elapsed, block = timed_frame(rollout)
        finite = finite and bool(block.values.isfinite().all())
        times.append(elapsed)
        memory.append(memory_mib(device))
        if frame >= arguments.frames - SPAN:
            paired.append(timed_frame(fresh)[0])

    first, last = times[STEADY : STEADY + SPAN], times[-SPAN:]
    row = {
        "bench": "long_rollout",
        "frames": arguments.frames,
        "window": WINDOW,
        "sinks": SINKS,
        "first_steady_100_ms": statistics.median(first),
        "last_100_ms": statistics.median(last),
        "first_again_100_ms": statistics.median(paired),
        "last_over_first_again": statistics.median(last) / statistics.median(paired),
        "memory_after_steady_mib": memory[STEADY],
        "memory_at_end_mib": memory[-1],
        "all_finite": finite,
    }
    print(f"frames {STEADY}..{STEADY + SPAN - 1}: median {row['first_steady_100_ms']:.2f} ms in the long rollout")
    print(f"last {SPAN} frames: median {row['last_100_ms']:.2f} ms")
    print(f"frames {STEADY}..{STEADY + SPAN - 1} again, interleaved with the last: {row['first_again_100_ms']:.2f} ms")
    print(f"last / first, interleaved: {row['last_over_first_again']:.3f}")
    print(f"memory: {memory[STEADY]:.0f} MiB when the window is full, {memory[-1]:.0f} MiB at the end")
    print(f"every value finite: {finite}")
    harness.record([row], arguments.json, device)
    if arguments.plot:
        plot(times, memory, arguments.plot)


if __name__ == "__main__":
    main()
