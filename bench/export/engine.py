"""Time a latent frame of the same rollout in ONNX Runtime and in PyTorch, both on this CPU.

The network has the sizes of the built-in world's student (configs/world.yaml) and random weights. Its ONNX bundle,
driven with numpy, and the PyTorch model are timed interleaved, frame by frame, with a full window. Latents only: no
codec runs.

    python -m cfpp_rt.bench.export.engine [--dtype float32] [--refresh fused] [--threads 1] [--rounds 300]
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency.workload import WORLD
from cfpp_rt.config import RolloutConfig
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.onnx_runner import OnnxRunner
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import DTYPES, empty_prompt_embeds

LATENT_SIZE = (6, 6)  # frames of 48x48
WINDOW = 3


def main() -> None:
    parser = harness.parser(__doc__, json=True)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--refresh", choices=("fused", "separate"), default="fused")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each runtime (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=300, help="latent frames to time (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, config = torch.device("cpu"), RolloutConfig(window=WINDOW, refresh=arguments.refresh)
    model = random_model(WORLD, seed=0, dtype=DTYPES[arguments.dtype])
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, config, Path(folder, "world"), latent_size=LATENT_SIZE, latent_frames=None)
        ours = BundleRollout(OnnxRunner(Path(folder, "world"), arguments.threads), latent_frames=None)
        theirs = Rollout(
            model, empty_prompt_embeds(1, WORLD.text_dim), config, latent_size=LATENT_SIZE, latent_frames=None
        )
        for _ in range(WINDOW + 1):
            next(ours), next(theirs)
        calls = {"onnxruntime": lambda: next(ours), "torch": lambda: next(theirs)}
        times = harness.measure_interleaved(calls, device, rounds=arguments.rounds)
    rows = []
    for runtime, t in times.items():
        print(f"{runtime:<12} {t.median_ms:7.3f} ms per latent frame (p10 {t.p10_ms:.3f}, p90 {t.p90_ms:.3f})")
        row = {"bench": "engine", "runtime": runtime, "model": "world", "dtype": arguments.dtype}
        row |= {"refresh": arguments.refresh, "window": WINDOW, "frame_ms": t.median_ms}
        rows.append({**row, "frame_ms_p10": t.p10_ms, "frame_ms_p90": t.p90_ms, "onnxruntime": version("onnxruntime")})
    print(f"onnxruntime takes {times['onnxruntime'].median_ms / times['torch'].median_ms:.2f} of torch's time")
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
