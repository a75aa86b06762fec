"""Measure the time and peak memory of exporting a student to ONNX.

The weights are random and have the model's shapes. All of `cfpp export onnx` is timed: graphs, weights, the checker and
sha256. Peak memory is that of the process, with the model's weights.

    python -m cfpp_rt.bench.export.export_memory [--model wan-1.3b] [--dtype bfloat16] [--linear-dtype float8_e4m3]
        [--frames 21]
"""

import resource
import tempfile
import time
from pathlib import Path

import torch

from cfpp_rt.bench import harness
from cfpp_rt.config import MODELS, rollout_preset
from cfpp_rt.export.bundle import BUNDLE_LINEAR_DTYPES, open_bundle
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.model.transformer import random_model
from cfpp_rt.values import DTYPES


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = harness.parser(__doc__, json=True)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--linear-dtype", choices=BUNDLE_LINEAR_DTYPES, help="8-bit dtype of the linear layers (default: none)"
    )
    parser.add_argument("--frames", type=int, default=21, help="latent frames of the cache (default: %(default)s)")
    parser.add_argument("--folder", help="parent of the temporary folder for the bundle (default: the system's)")
    arguments = parser.parse_args()
    model = random_model(MODELS[arguments.model], seed=0, dtype=DTYPES[arguments.dtype])
    before = peak_mib()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bundle = Path(folder, "bundle")
        begin = time.perf_counter()
        export_onnx(
            model,
            rollout_preset("framewise-2step"),
            bundle,
            latent_size=harness.LATENT_480P,
            latent_frames=arguments.frames,
            linear_dtype=arguments.linear_dtype,
        )
        export_s = time.perf_counter() - begin
        begin = time.perf_counter()
        open_bundle(bundle)
        open_s = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in bundle.iterdir()) / 2**20
        graphs = sum(path.stat().st_size for path in bundle.glob("*.onnx")) / 2**20
    numbers = (
        arguments.dtype if arguments.linear_dtype is None else f"{arguments.dtype}, linears {arguments.linear_dtype}"
    )
    print(f"{arguments.model} {numbers}: exported in {export_s:.1f} s, checked when opened in {open_s:.1f} s")
    print(f"bundle {size:.0f} MiB, graphs alone {graphs:.1f} MiB; peak memory {peak_mib():.0f} MiB, model {before:.0f}")
    row = {
        "bench": "export",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "linear_dtype": arguments.linear_dtype,
        "frames": arguments.frames,
        "export_s": export_s,
        "open_s": open_s,
        "bundle_mib": size,
        "graphs_mib": graphs,
        "peak_mib": peak_mib(),
        "model_peak_mib": before,
    }
    harness.record([row], arguments.json, torch.device("cpu"))


if __name__ == "__main__":
    main()
