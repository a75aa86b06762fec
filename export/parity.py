"""The parity gate: a bundle against the PyTorch model that it was exported from, graph by graph and as a rollout.

Per graph, on the same fixed inputs: every output, caches included. As a rollout: the same seeds, through ring wrap,
window and sinks where the bundle has them. A float32 bundle must agree to `TOLERANCE`; one in float16 may err at most
twice as much as plain PyTorch in float16 (`plain`), both against the same weights in float32. bfloat16 is not run:
onnxruntime has none on the CPU; such a bundle is checked in structure alone, and the report says so.

With linears in 8 bits, the runtime computes them so, too, and the rule is that of float16: at most twice its error, of
a rollout in the mean. One code that falls the other way, where a sum was rounded differently, makes all later codes of
its token fall differently, so no closer agreement can be asked; that no linear was forgotten is seen in the graph.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cfpp_rt.codec.base import Codec
from cfpp_rt.core.camera import Cameras, walk
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import Bundle
from cfpp_rt.export.bundle_rollout import BundleRollout, OnnxRunner
from cfpp_rt.export.bundle_stream import BundleDecoder
from cfpp_rt.export.cameras import EngineCameras
from cfpp_rt.export.check_onnx import check_graph
from cfpp_rt.export.contract import TensorSpec, network_graphs
from cfpp_rt.export.onnx_runner import GraphSession
from cfpp_rt.export.plain import with_plain_attention
from cfpp_rt.export.torch_oracle import fixed_inputs, run_in_torch
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed.quantize import quantize_linears

TOLERANCE = 1e-4  # of float32, absolute: latents and activations are of the order of 1
FACTOR = 2.0  # of float16: how much more than PyTorch's a graph's error may be
ROLLOUT_FRAMES = 21
_KEYS = ("w", "l", "u", "a")  # of the camera's path, if there is one: it moves and turns
_DECODED = 3  # latent frames: the first, the second whose state is new, and one under way
_HALF_PIXELS = 0.05  # of pixels in [-1, 1] that a decoder in half precision makes, whose exact order of sums is open
Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor compared. limit: what max_error may be, or mean_error where by_mean, for the tensor to be good."""

    graph: str
    tensor: str
    max_error: float
    mean_error: float
    limit: float
    by_mean: bool = False

    @property
    def excess(self) -> float:
        """The error by what it may be."""
        return (self.mean_error if self.by_mean else self.max_error) / self.limit

    @property
    def good(self) -> bool:
        return self.excess <= 1  # False for NaN


def verify(
    bundle: Bundle,
    model: CausalWanTransformer,
    *,
    codec: Codec | None = None,
    tolerance: float = TOLERANCE,
    frames: int = ROLLOUT_FRAMES,
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare; returns the report, ready for JSON, of which `passed` and `worst` are the upshot.

    model: what was exported, in the bundle's dtype. codec: to decode both rollouts and give their PSNR. frames: latent
    frames of the rollout, fewer where the bundle holds fewer, more where its ring would not wrap. say: is told of every
    graph.

    Raises InputError for a model of other sizes or dtype, and for a graph whose structure is not the contract's.
    """
    card = bundle.card
    dtype = str(model.dtype).removeprefix("torch.")
    ours, theirs = (
        {**sizes.to_dict(), "dtype": kind}
        for sizes, kind in ((card.sizes.model, card.sizes.dtype), (model.config, dtype))
    )
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        name = differing[0]
        raise InputError(
            f"{bundle.folder}: exported from another student: {name} is {ours[name]}, that of the model {theirs[name]}"
        )
    for name, spec in card.graphs.items():
        check_graph(bundle.path(name), spec, card.linear_dtype)
    report: dict[str, Any] = {"bundle": str(bundle.folder), "dtype": dtype, "linear_dtype": card.linear_dtype}
    report["graphs"] = sorted(card.graphs)
    if dtype == "bfloat16":
        say("structure checked; numbers are not: onnxruntime has no bfloat16 on the CPU, verify float32 or float16")
        return {**report, "numerics": "not run", "passed": True, "worst": None, "tensors": []}
    oracle = None if dtype == "float32" and card.linear_dtype is None else copy.deepcopy(model).float()
    if card.linear_dtype is not None:
        model = quantize_linears(copy.deepcopy(model).requires_grad_(False), card.linear_dtype, emulated=True)
    if dtype != "float32":
        model = with_plain_attention(model)
    differences = []
    for name in network_graphs(card.sizes):
        found = _graph(bundle, model, oracle, name, tolerance, threads)
        say(f"{name:<12} {len(found):>4} tensors, worst {_said(_worst(found))}")
        differences += found
    if card.codec is not None and codec is not None:
        differences.append(_decoder(bundle, codec, tolerance, threads))
        say(f"{'decoder':<12} {_DECODED:>4} latent frames, {_said(differences[-1])}")
    facts: dict[str, Any] | None = None
    if all(difference.good for difference in differences):  # else it would only hide which graph is at fault
        rollout, facts = _rollout(bundle, model, oracle, codec, tolerance, frames, threads)
        psnr = f", PSNR {facts['psnr_db']:.1f} dB" if facts.get("psnr_db") else ""
        say(f"{'rollout':<12} {facts['frames']:>4} latent frames, {_said(rollout)}{psnr}")
        differences.append(rollout)
    worst = _worst(differences)
    return {
        **report,
        "numerics": "onnxruntime against PyTorch",
        "tolerance": tolerance if oracle is None else f"{FACTOR} x PyTorch's error in {card.linear_dtype or dtype}",
        "passed": all(difference.good for difference in differences),
        "worst": dataclasses.asdict(worst),
        "rollout": facts,
        "tensors": [dataclasses.asdict(difference) for difference in differences],
    }


def require_passed(report: dict[str, Any]) -> None:
    """Raise InputError, one line, unless the report is that of a bundle that agrees."""
    if not report["passed"]:
        worst = report["worst"]
        error = f"{worst['mean_error']:.3g} in the mean" if worst["by_mean"] else f"{worst['max_error']:.3g}"
        raise InputError(
            f"{report['bundle']}: does not agree with PyTorch: {worst['tensor']} of {worst['graph']} is off by"
            f" {error}, allowed is {worst['limit']:.3g}"
        )


def _graph(
    bundle: Bundle,
    model: CausalWanTransformer,
    oracle: CausalWanTransformer | None,
    name: str,
    tolerance: float,
    threads: int | None,
) -> list[Difference]:
    spec, session = bundle.card.graphs[name], GraphSession(bundle, name, threads)
    inputs = fixed_inputs(bundle.card, spec)
    ours = session(**inputs)
    theirs = run_in_torch(model, bundle.card, spec, inputs)
    exact = theirs if oracle is None else run_in_torch(oracle, bundle.card, spec, inputs)
    found = []
    for tensor in spec.outputs:
        limit = tolerance if oracle is None else _allowed(theirs[tensor.name], exact[tensor.name], tolerance)
        found.append(_compare(name, tensor, ours[tensor.name], exact[tensor.name], limit))
    return found


def _allowed(theirs: Array, exact: Array, tolerance: float, *, by_mean: bool = False) -> float:
    return FACTOR * _errors(theirs, exact)[by_mean] + tolerance


def _errors(ours: Array, exact: Array) -> tuple[float, float]:
    """Largest and mean absolute difference, infinity where one is not a number."""
    error = np.abs(ours.astype(np.float64) - exact.astype(np.float64))
    return (float(error.max()), float(error.mean())) if np.isfinite(error).all() else (math.inf, math.inf)


def _compare(graph: str, tensor: TensorSpec, ours: Array, exact: Array, limit: float) -> Difference:
    return Difference(graph, tensor.name, *_errors(ours, exact), limit)


def _said(difference: Difference) -> str:
    return f"{difference.tensor}: at most {difference.max_error:.2e} off, {difference.mean_error:.2e} in the mean"


def _worst(differences: list[Difference]) -> Difference:
    return max(differences, key=lambda difference: difference.excess)


def _rollout(
    bundle: Bundle,
    model: CausalWanTransformer,
    oracle: CausalWanTransformer | None,
    codec: Codec | None,
    tolerance: float,
    frames: int,
    threads: int | None,
) -> tuple[Difference, dict[str, Any]]:
    card, block = bundle.card, bundle.card.sizes.block
    if card.rollout.window is not None:
        frames = max(frames, card.sizes.slots + block)  # the ring wraps
    frames = max(min(frames, card.frames or frames) // block * block, block)
    embeds = np.random.default_rng(1).standard_normal(
        (card.sizes.batch, card.sizes.model.text_len, card.sizes.model.text_dim), dtype=np.float32
    )
    path = None
    if card.sizes.model.camera:
        path = Cameras.of(walk([_KEYS[frame % len(_KEYS)] for frame in range(frames)], torch.eye(4)))
    ours = _drive(
        BundleRollout(
            OnnxRunner(bundle, threads),
            embeds if card.sizes.model.text_len else None,
            latent_frames=frames,
            cameras=None if path is None else EngineCameras.of(path.views, path.focal, card.sizes.batch),
        ),
        bundle,
    )

    def in_torch(network: CausalWanTransformer) -> Array:
        text, size = torch.from_numpy(embeds), card.sizes.latent_size
        rollout = Rollout(network, text, card.rollout, latent_size=size, latent_frames=frames, cameras=path)
        return _drive(rollout, bundle)

    theirs = in_torch(model)
    exact = theirs if oracle is None else in_torch(oracle)
    by_mean = card.linear_dtype is not None
    limit = tolerance if oracle is None else _allowed(theirs, exact, tolerance, by_mean=by_mean)
    facts: dict[str, Any] = {
        "frames": frames,
        "window": card.rollout.window,
        "sinks": card.sizes.sinks,
        "refresh": card.rollout.refresh,
        "ring_wraps": frames > card.sizes.slots,
    }
    if codec is not None:
        facts["psnr_db"] = _psnr(codec, ours, exact)
    spec = TensorSpec("latents", ours.shape, "float32")
    return dataclasses.replace(_compare("rollout", spec, ours, exact, limit), by_mean=by_mean), facts


def _decoder(bundle: Bundle, codec: Codec, tolerance: float, threads: int | None) -> Difference:
    """The streaming decoder of the bundle against the codec's, on a few latent frames of noise."""
    shape = bundle.card.sizes.frame_shape(_DECODED)
    latents = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    ours = BundleDecoder(OnnxRunner(bundle, threads)).decode(latents)
    exact = codec.decode(torch.from_numpy(latents)).numpy()
    half = any(tensor.dtype != "float32" for graph in (bundle.card.codec or {}).values() for tensor in graph.outputs)
    limit = _HALF_PIXELS if half else tolerance
    return _compare("decoder", TensorSpec("pixels", ours.shape, "float32"), ours, exact, limit)


def _drive(rollout: Rollout | BundleRollout, bundle: Bundle) -> Array:
    """All latents, an action of its own for each block where the model knows actions."""
    actions = bundle.card.sizes.model.num_actions
    made: list[Array] = []
    blocks: Iterator[Any] = rollout
    while True:
        if actions:
            rollout.set_actions(len(made) % actions)
        block = next(blocks, None)
        if block is None:
            return np.concatenate(made, axis=1)
        made.append(np.asarray(block.values))


def _psnr(codec: Codec, ours: Array, exact: Array) -> float | None:
    """Of the decoded pictures, in dB; None where they are equal."""
    pictures = [codec.decode(torch.from_numpy(latents)).double().clamp(-1, 1) for latents in (ours, exact)]
    error = float((pictures[0] - pictures[1]).square().mean())
    return 10 * math.log10(4 / error) if error else None
