"""Measure what building TensorRT engines of the published size costs, ahead of time, on a machine without a GPU.

Exports a student with random weights (default: Wan2.1-1.3B, 480x832, a cache of 21 latent frames), then builds one
engine per graph for one architecture, each in a process of its own, and prints seconds, peak resident memory and size.
The network of every graph is checked against its contract before it is built. The engines are deleted.

    python -m cfpp_rt.bench.export.engine_build [--target sm89] [--dtype bfloat16] [--linear-dtype float8_e4m3]
        [--model wan-1.3b] [--json PATH]
"""

import tempfile
import time
from pathlib import Path

import torch

from cfpp_rt.bench import harness
from cfpp_rt.config import MODELS, rollout_preset
from cfpp_rt.export.bundle import BUNDLE_LINEAR_DTYPES
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.trt.build import build_engine
from cfpp_rt.export.trt.build_worker import Job
from cfpp_rt.export.trt.library import load_library
from cfpp_rt.model.transformer import random_model
from cfpp_rt.random_weights import SMALL
from cfpp_rt.values import DTYPES

SIZES = {"small": (SMALL, (8, 12)), "wan-1.3b": (MODELS["wan-1.3b"], harness.LATENT_480P)}
LATENT_FRAMES = 21  # of the cache


def main() -> None:
    parser = harness.parser(__doc__, json=True)
    parser.add_argument("--target", default="sm89", help="GPU architecture to build for (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--linear-dtype", choices=BUNDLE_LINEAR_DTYPES, help="8-bit dtype of the linear layers (default: none)"
    )
    parser.add_argument("--model", choices=SIZES, default="wan-1.3b")
    parser.add_argument("--graphs", nargs="+", help="names of the graphs to build (default: all)")
    parser.add_argument(
        "--folder", help="parent of the temporary folder for graphs and engines (default: the system's)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=3600, help="seconds allowed for one engine (default: %(default)s)"
    )
    arguments = parser.parse_args()
    library = load_library("tensorrt-rtx")
    library.require_target(arguments.target)
    config, latent_size = SIZES[arguments.model]

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = random_model(config, seed=0, dtype=DTYPES[arguments.dtype])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        begin = time.perf_counter()
        graphs = Path(folder, "graphs")
        options = {"latent_size": latent_size, "latent_frames": LATENT_FRAMES, "linear_dtype": arguments.linear_dtype}
        card = export_onnx(model, rollout_preset("framewise-2step"), graphs, **options)
        export_s = time.perf_counter() - begin
        del model  # the builder needs the memory
        print(
            f"{parameters / 1e6:.1f} M parameters in {arguments.dtype}; {len(card.graphs)} graphs in {export_s:.1f} s"
        )
        for name in arguments.graphs or card.graphs:
            engine = Path(folder, "graph.engine")
            job = Job(str(graphs / f"{name}.onnx"), str(engine), library.name, arguments.target, card.graphs[name])
            built = build_engine(job, time_limit_s=arguments.time_limit)
            engine.unlink()
            row = {
                "bench": "engine_build",
                "model": arguments.model,
                "parameters": parameters,
                "latent_size": list(latent_size),
                "frames": LATENT_FRAMES,
                "dtype": arguments.dtype,
                "linear_dtype": arguments.linear_dtype,
                "graph": name,
                "target": arguments.target,
                "library": f"{built.library} {built.version}",
                "export_s": export_s,
                "parse_s": built.parse_s,
                "build_s": built.build_s,
                "peak_mib": built.peak_mib,
                "engine_mib": built.bytes / 2**20,
                "activation_mib": built.activation_mib,
                "network_layers": built.network["layers"],
                "float8_linears": built.network["float8_linears"],
                "self_attentions": len(built.network["sites"]),
                "cross_attentions": built.network["cross_attentions"],
            }
            activations = "?" if built.activation_mib is None else f"{built.activation_mib:.0f}"
            print(
                f"{name:<11} parse {built.parse_s:6.1f} s, build {built.build_s:6.1f} s,"
                f" peak {built.peak_mib:7.0f} MiB, engine {built.bytes / 2**20:7.1f} MiB,"
                f" activations {activations} MiB",
                flush=True,
            )
            harness.record([row], arguments.json, torch.device("cpu"))


if __name__ == "__main__":
    main()
