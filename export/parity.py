"""The parity gate: compares a bundle with the PyTorch model that it was exported from, by graph and as a rollout.

For each graph, it compares every output, caches included, on the same fixed inputs. For a rollout, it compares the
latents from the same seeds; the ring wraps, and window and sinks apply, if the bundle has them. A float32 bundle must
agree to `TOLERANCE`. The error of a float16 bundle may be at most twice that of plain PyTorch in float16
(`torch_oracle.with_plain_attention`); both errors are measured against the same weights in float32. A bfloat16 bundle
does not run, because onnxruntime has no bfloat16 on the CPU: only its structure is checked, and the report says so.

With linears in 8 bits, the PyTorch model computes them in 8 bits too. The rule is that of float16: its error may be at
most twice PyTorch's; for a rollout the mean error is compared, because a single FP8 code that is rounded differently
changes all later codes of its token. `check_graph` finds a linear that is not in 8 bits.
"""

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfpp_rt.codec.base import Codec
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import Cameras, walk
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import Bundle, open_bundle
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.bundle_stream import BundleDecoder
from cfpp_rt.export.check_onnx import check_graph
from cfpp_rt.export.contract import network_graphs
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.onnx_runner import GraphSession, OnnxRunner
from cfpp_rt.export.runner import Array
from cfpp_rt.export.torch_oracle import fixed_inputs, run_in_torch, with_plain_attention
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed.quantize import quantize_linears

TOLERANCE = 1e-4  # absolute error of a float32 bundle: latents and activations are of the order of 1
FACTOR = 2.0  # largest allowed error in float16 or 8 bits, as a multiple of PyTorch's
ROLLOUT_FRAMES = 21  # latent frames
_CAMERA_KEYS = ("w", "l", "u", "a")  # a camera path that moves and turns
_DECODED_FRAMES = 3  # first, second (new state) and third latent frame
_HALF_PRECISION_TOLERANCE = 0.05  # for pixels in [-1, 1]: the order of sums of such a decoder is not defined


@dataclasses.dataclass(frozen=True)
class Difference:
    """One compared tensor.

    limit: largest allowed max_error, or mean_error if by_mean.
    """

    graph: str
    tensor: str
    max_error: float
    mean_error: float
    limit: float
    by_mean: bool = False

    @property
    def excess(self) -> float:
        """The error divided by its limit."""
        return (self.mean_error if self.by_mean else self.max_error) / self.limit

    @property
    def good(self) -> bool:
        return self.excess <= 1  # False for NaN

    def __str__(self) -> str:
        return f"{self.tensor}: largest error {self.max_error:.2e}, mean error {self.mean_error:.2e}"


def verify(
    bundle: Bundle,
    model: CausalWanTransformer,
    *,
    codec: Codec | None = None,
    tolerance: float = TOLERANCE,
    latent_frames: int = ROLLOUT_FRAMES,
    threads: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare the bundle with PyTorch; return a JSON-ready report: `passed`, `worst`, and an entry per tensor.

    model: the exported model, in the bundle's dtype.
    codec: the exported codec; compares the decoder, and adds the PSNR of the decoded rollouts to the report.
    latent_frames: length of the rollout. Shortened to what the bundle has room for; lengthened until its ring wraps.
    threads: see `OnnxRunner`.
    log: receives one line per graph.

    Raises InputError for a model of other sizes or dtype, and for a graph whose structure differs from the contract.
    """
    card = bundle.card
    dtype = str(model.dtype).removeprefix("torch.")
    _require_same_student(bundle, model, dtype)
    for name, spec in card.graphs.items():
        check_graph(bundle.path(name), spec, card.linear_dtype)
    report: dict[str, Any] = {"bundle": str(bundle.folder), "dtype": dtype, "linear_dtype": card.linear_dtype}
    report["graphs"] = sorted(card.graphs)
    if dtype == "bfloat16":
        log("structure checked; numbers are not: onnxruntime has no bfloat16 on the CPU, verify float32 or float16")
        return {**report, "numerics": "not run", "passed": True, "worst": None, "tensors": []}
    oracle = None if dtype == "float32" and card.linear_dtype is None else copy.deepcopy(model).float()
    if card.linear_dtype is not None:
        model = quantize_linears(copy.deepcopy(model).requires_grad_(False), card.linear_dtype, emulated=True)
    if dtype != "float32":
        model = with_plain_attention(model)
    differences = []
    for name in network_graphs(card.sizes):
        found = _compare_graph(bundle, model, oracle, name, tolerance, threads)
        log(f"{name:<12} {len(found):>4} tensors, worst {_worst(found)}")
        differences += found
    if card.codec is not None and codec is not None:
        differences.append(_compare_decoder(bundle, codec, tolerance, threads))
        log(f"{'decoder':<12} {_DECODED_FRAMES:>4} latent frames, {differences[-1]}")
    facts: dict[str, Any] | None = None
    if all(difference.good for difference in differences):  # otherwise the report names the graph, not the rollout
        rollout, facts = _compare_rollout(bundle, model, oracle, codec, tolerance, latent_frames, threads)
        psnr = f", PSNR {facts['psnr_db']:.1f} dB" if facts.get("psnr_db") else ""
        log(f"{'rollout':<12} {facts['frames']:>4} latent frames, {rollout}{psnr}")
        differences.append(rollout)
    return {
        **report,
        "numerics": "onnxruntime against PyTorch",
        "tolerance": tolerance if oracle is None else f"{FACTOR} x PyTorch's error in {card.linear_dtype or dtype}",
        "passed": all(difference.good for difference in differences),
        "worst": dataclasses.asdict(_worst(differences)),
        "rollout": facts,
        "tensors": [dataclasses.asdict(difference) for difference in differences],
    }


def require_passed(report: dict[str, Any]) -> None:
    """Raise InputError, with a message of one line, unless the report says that the bundle agrees with PyTorch."""
    if not report["passed"]:
        worst = report["worst"]
        error = f"{worst['mean_error']:.3g} on average" if worst["by_mean"] else f"{worst['max_error']:.3g}"
        raise InputError(
            f"{report['bundle']}: does not agree with PyTorch: {worst['tensor']} of {worst['graph']} is off by"
            f" {error}, allowed is {worst['limit']:.3g}"
        )


def require_parity(
    model: CausalWanTransformer,
    config: RolloutConfig,
    *,
    latent_size: tuple[int, int],
    latent_frames: int,
    batch: int,
    linear_dtype: str | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Export to a temporary bundle and compare it with PyTorch; return the summary for the card of the engines.

    latent_size: (h, w) of the comparison. Graphs of another size have the same nodes and weights and differ only in
        constants, so a small size runs every operator in little time.

    A bfloat16 student is compared in float32, because onnxruntime has no bfloat16 on the CPU. Raises InputError, with a
    message of one line, if the graphs differ from PyTorch.
    """
    if model.dtype == torch.bfloat16:
        model = copy.deepcopy(model).float()
    options = {"latent_size": latent_size, "latent_frames": latent_frames, "batch": batch, "linear_dtype": linear_dtype}
    with tempfile.TemporaryDirectory(prefix="cfpp-parity-") as folder:
        path = Path(folder, "graphs")
        export_onnx(model, config, path, **options)
        report = verify(open_bundle(path), model, log=log)
    height, width = latent_size
    require_passed({**report, "bundle": f"the graphs at {height * 8}x{width * 8}"})
    wanted = ("dtype", "linear_dtype", "numerics", "tolerance", "passed", "worst", "rollout")
    return {**{name: report[name] for name in wanted}, "latent_size": list(latent_size)}


def _require_same_student(bundle: Bundle, model: CausalWanTransformer, dtype: str) -> None:
    sizes = bundle.card.sizes
    exported, given = {**sizes.model.to_dict(), "dtype": sizes.dtype}, {**model.config.to_dict(), "dtype": dtype}
    name = next((name for name in exported if exported[name] != given[name]), None)
    if name is not None:
        raise InputError(
            f"{bundle.folder}: exported from another student: {name} is {exported[name]}, that of the model"
            f" {given[name]}"
        )


def _compare_graph(
    bundle: Bundle,
    model: CausalWanTransformer,
    oracle: CausalWanTransformer | None,
    name: str,
    tolerance: float,
    threads: int | None,
) -> list[Difference]:
    """Compare all outputs of a graph. oracle: the model in float32; None if `model` is in float32 itself."""
    spec, session = bundle.card.graphs[name], GraphSession(bundle, name, threads)
    inputs = fixed_inputs(bundle.card, spec)
    from_bundle = session.run_on_copies(**inputs)
    from_torch = run_in_torch(model, bundle.card, spec, inputs)
    exact = from_torch if oracle is None else run_in_torch(oracle, bundle.card, spec, inputs)
    found = []
    for tensor in spec.outputs:
        limit = tolerance if oracle is None else _limit(from_torch[tensor.name], exact[tensor.name], tolerance)
        found.append(Difference(name, tensor.name, *_errors(from_bundle[tensor.name], exact[tensor.name]), limit))
    return found


def _compare_rollout(
    bundle: Bundle,
    model: CausalWanTransformer,
    oracle: CausalWanTransformer | None,
    codec: Codec | None,
    tolerance: float,
    latent_frames: int,
    threads: int | None,
) -> tuple[Difference, dict[str, Any]]:
    """Compare the latents of a rollout; return the difference, and facts about the rollout for the report."""
    card, sizes, n = bundle.card, bundle.card.sizes, bundle.card.sizes.frames_per_block
    if card.config.window is not None:
        latent_frames = max(latent_frames, sizes.slots + n)  # the ring wraps
    latent_frames = max(min(latent_frames, card.latent_frames or latent_frames) // n * n, n)
    shape = (sizes.batch, sizes.model.text_len, sizes.model.text_dim)
    prompt_embeds = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    cameras = None
    if sizes.model.camera:
        cameras = Cameras.of(
            walk([_CAMERA_KEYS[frame % len(_CAMERA_KEYS)] for frame in range(latent_frames)], np.eye(4))
        )
    given_text = prompt_embeds if sizes.model.text_len else None
    bundle_rollout = BundleRollout(
        OnnxRunner(bundle, threads), given_text, latent_frames=latent_frames, cameras=cameras
    )
    from_bundle = _all_latents(bundle_rollout, sizes.model.num_actions)

    def in_torch(network: CausalWanTransformer) -> Array:
        rollout = Rollout(
            network,
            torch.from_numpy(prompt_embeds),
            card.config,
            latent_size=sizes.latent_size,
            latent_frames=latent_frames,
            cameras=cameras,
        )
        return _all_latents(rollout, sizes.model.num_actions)

    from_torch = in_torch(model)
    exact = from_torch if oracle is None else in_torch(oracle)
    by_mean = card.linear_dtype is not None
    limit = tolerance if oracle is None else _limit(from_torch, exact, tolerance, by_mean=by_mean)
    facts: dict[str, Any] = {
        "frames": latent_frames,
        "window": card.config.window,
        "sinks": sizes.sinks,
        "refresh": card.config.refresh,
        "ring_wraps": latent_frames > sizes.slots,
    }
    if codec is not None:
        facts["psnr_db"] = _psnr(codec, from_bundle, exact)
    return Difference("rollout", "latents", *_errors(from_bundle, exact), limit, by_mean), facts


def _compare_decoder(bundle: Bundle, codec: Codec, tolerance: float, threads: int | None) -> Difference:
    """Compare the bundle's streaming decoder with the codec's, on a few latent frames of noise."""
    shape = bundle.card.sizes.frame_shape(_DECODED_FRAMES)
    latents = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    from_bundle = BundleDecoder(OnnxRunner(bundle, threads)).decode(latents)
    exact = codec.decode(torch.from_numpy(latents)).numpy()
    half = any(tensor.dtype != "float32" for graph in (bundle.card.codec or {}).values() for tensor in graph.outputs)
    return Difference(
        "decoder", "pixels", *_errors(from_bundle, exact), _HALF_PRECISION_TOLERANCE if half else tolerance
    )


def _errors(from_bundle: Array, exact: Array) -> tuple[float, float]:
    """Return the largest and the mean absolute difference, infinity if any is not a number."""
    error = np.abs(from_bundle.astype(np.float64) - exact.astype(np.float64))
    return (float(error.max()), float(error.mean())) if np.isfinite(error).all() else (math.inf, math.inf)


def _limit(from_torch: Array, exact: Array, tolerance: float, *, by_mean: bool = False) -> float:
    """Return the error that a graph may have, given PyTorch's results in the same dtype."""
    return FACTOR * _errors(from_torch, exact)[by_mean] + tolerance


def _worst(differences: list[Difference]) -> Difference:
    return max(differences, key=lambda difference: difference.excess)


def _all_latents(rollout: Rollout | BundleRollout, num_actions: int) -> Array:
    """Return all latents of a rollout, with another action in each block if the model has actions."""
    made: list[Array] = []
    blocks: Iterator[Any] = rollout
    while True:
        if num_actions:
            rollout.set_actions(len(made) % num_actions)
        block = next(blocks, None)
        if block is None:
            return np.concatenate(made, axis=1)
        made.append(np.asarray(block.values))


def _psnr(codec: Codec, from_bundle: Array, exact: Array) -> float | None:
    """Return the PSNR of the decoded frames in dB; None if they are equal."""
    a, b = (codec.decode(torch.from_numpy(latents)).double().clamp(-1, 1) for latents in (from_bundle, exact))
    error = float((a - b).square().mean())
    return 10 * math.log10(4 / error) if error else None
