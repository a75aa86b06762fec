"""The parity gate before a build: the student's graphs against PyTorch, where ONNX Runtime can run them."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfpp_rt.config import RolloutConfig
from cfpp_rt.export.bundle import open_bundle
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.parity import require_passed, verify
from cfpp_rt.model.transformer import CausalWanTransformer


def require_parity(
    model: CausalWanTransformer,
    rollout: RolloutConfig,
    *,
    latent_size: tuple[int, int],
    frames: int,
    batch: int,
    linear_dtype: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Export, compare with PyTorch graph by graph and as a rollout, and return what the engines' card says of it.

    latent_size: (h, w) of the comparison. The graphs of another size have the same nodes and weights and other
    constants, so a small size tries every operator in little time. A bfloat16 student is compared in float32: ONNX
    Runtime has no bfloat16 on the CPU. Raises InputError, in one line, where they differ.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype == "bfloat16":
        model = copy.deepcopy(model).float()
    with tempfile.TemporaryDirectory(prefix="cfpp-parity-") as folder:
        path = Path(folder, "graphs")
        export_onnx(
            model, rollout, path, latent_size=latent_size, latent_frames=frames, batch=batch, linear_dtype=linear_dtype
        )
        report = verify(open_bundle(path), model, say=say)
    height, width = latent_size
    require_passed({**report, "bundle": f"the graphs at {height * 8}x{width * 8}"})
    wanted = ("dtype", "linear_dtype", "numerics", "tolerance", "passed", "worst", "rollout")
    return {**{name: report[name] for name in wanted}, "latent_size": list(latent_size)}
