"""Linear layers in 8 bits: the numbers, the graphs against PyTorch, and what TensorRT makes of them."""

import copy
import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import numpy_helper

from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import open_bundle, write_card
from cfpp_rt.export.contract import PASSES
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.float8 import FLOAT8, LINEARS, quantize_weight
from cfpp_rt.export.onnx_runner import GraphSession
from cfpp_rt.export.parity import require_passed, verify
from cfpp_rt.export.torch_oracle import fixed_inputs, run_in_torch
from cfpp_rt.model.transformer import random_model
from cfpp_rt.speed.quantize import quantize_linears
from tests.export.needs import needs_tensorrt
from tests.export.students import ROLLING, TINY

RUN = RolloutConfig(steps=(1000, 500), window=4, sinks=1)
WEIGHTS = TINY.num_layers * (6 * TINY.dim**2 + 2 * TINY.dim * TINY.ffn_dim)  # of the linears in 8 bits


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    model = random_model(TINY, seed=0, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("float8") / "bundle"
    export_onnx(model, RUN, folder, latent_size=(4, 6), latent_frames=None, linear_dtype=FLOAT8)
    return model, open_bundle(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_the_nearest_codes(dtype):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    codes, scale = quantize_weight(weight)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (6,) and scale.dtype == dtype
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()]
    wanted = weight.double() / scale.double()[:, None]
    nearest = (wanted[..., None] - table).abs().amin(-1)
    assert torch.allclose((codes.double() - wanted).abs(), nearest, rtol=0, atol=1e-4)
    largest = codes.double().abs().amax(1)
    assert largest[2] == 0 and (largest[[0, 1, 3, 4, 5]] == 448).all(), "every channel fills the range of e4m3"


def test_graphs_compute_as_pytorch_does_in_8_bits(student):
    """What passes one layer is alike but for codes that fall the other way, which are rare; the rest is similar."""
    model, bundle = student
    in_8_bits = quantize_linears(copy.deepcopy(model), FLOAT8, emulated=True)
    for name in PASSES:
        spec = bundle.card.graphs[name]
        inputs = fixed_inputs(bundle.card, spec)
        ours = GraphSession(bundle, name, 1).run_on_copies(**inputs)
        theirs, exact = (run_in_torch(network, bundle.card, spec, inputs) for network in (in_8_bits, model))
        for tensor in (tensor.name for tensor in spec.outputs):
            cost, apart = (np.abs(theirs[tensor] - other[tensor]).mean() for other in (exact, ours))
            assert cost > 1e-3 and apart < (0.5 if tensor == "velocity" else 0.05) * cost, (name, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bundle_in_8_bits_passes(tmp_path, dtype):
    model = random_model(TINY, seed=0, dtype=dtype)
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 6), latent_frames=None, linear_dtype=FLOAT8)
    bundle = open_bundle(tmp_path / "b")
    report = verify(bundle, model, threads=1)
    require_passed(report)
    assert bundle.card.linear_dtype == report["linear_dtype"] == FLOAT8 and bool(report["tensors"]) == (
        dtype != torch.bfloat16
    )
    graph = onnx.load(bundle.path("step"), load_external_data=False).graph
    codes = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert sorted(tensor.name for tensor in codes) == sorted(
        f"blocks.{layer}.{name}.weight"
        for layer in range(TINY.num_layers)
        for name in LINEARS
        if name != "self_attn.prope_o"
    )
    assert sum(np.prod(tensor.dims) for tensor in codes) == WEIGHTS


def test_the_same_student_gives_the_same_bytes(student, tmp_path):
    model, bundle = student
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 6), latent_frames=None, linear_dtype=FLOAT8)
    for path in bundle.folder.iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def full_precision(graph):
    """One linear whose input skips its codes."""
    product = next(node for node in graph.node if node.op_type == "MatMul" and "ffn" in node.input[1])
    by_output = {node.output[0]: node for node in graph.node}
    codes = by_output[by_output[product.input[0]].input[0]]
    product.input[0] = codes.input[0]


def another_scale(graph):
    scale = next(node for node in graph.node if node.op_type == "DequantizeLinear" and "self_attn.v" in node.input[0])
    graph.initializer.append(numpy_helper.from_array(np.full(TINY.dim, 0.01, np.float32), "planted"))
    scale.input[1] = "planted"


@pytest.mark.parametrize(
    "change,message",
    [
        (full_precision, "step.onnx: both operands of the product with .* must be in float8_e4m3"),
        (another_scale, "values.0.updated of step is off by"),
    ],
)
def test_planted_faults_are_found(student, tmp_path, change, message):
    model, bundle = student
    shutil.copytree(bundle.folder, tmp_path / "b")
    graph = onnx.load(tmp_path / "b" / "step.onnx", load_external_data=False)
    for node in graph.graph.node:  # named after the weight, so that the faults can find it
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(".weight"):
            for reader in graph.graph.node:
                reader.input[:] = [f"{node.input[0]}.wide" if x == node.output[0] else x for x in reader.input]
            node.output[0] = f"{node.input[0]}.wide"
    change(graph.graph)
    (tmp_path / "b" / "step.onnx").write_bytes(graph.SerializeToString())
    (tmp_path / "b" / "card.json").unlink()
    write_card(tmp_path / "b", bundle.card)
    with pytest.raises(InputError, match=message):
        require_passed(verify(open_bundle(tmp_path / "b"), model, threads=1))


def test_other_linears_are_refused(tmp_path):
    with pytest.raises(InputError, match="linear_dtype must be None or float8_e4m3, got 'int4'"):
        model = random_model(TINY, seed=0, dtype=torch.float32)
        export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 6), latent_frames=None, linear_dtype="int4")


@needs_tensorrt
@pytest.mark.parametrize("dtype,target", [("bfloat16", "sm89"), ("float16", "sm120")])
def test_an_engine_multiplies_in_8_bits(tmp_path, dtype, target):
    """The text in an engine names every tensor: the weights of all linears are in 8 bits, and so are their inputs."""
    from cfpp_rt.export.trt.build import build_engine
    from cfpp_rt.export.trt.build_worker import Job

    model = random_model(TINY, seed=0, dtype=getattr(torch, dtype))
    export_onnx(model, ROLLING, tmp_path / "b", latent_size=(4, 6), latent_frames=None, linear_dtype=FLOAT8)
    bundle = open_bundle(tmp_path / "b")
    engine = tmp_path / "step.engine"
    built = build_engine(Job(str(bundle.path("step")), str(engine), "tensorrt-rtx", target, bundle.card.graphs["step"]))
    assert built.network["float8_linears"] == 8 * TINY.num_layers
    tensors = [text for text in re.findall(rb"tensor=\{.*?type=\w+ \}", engine.read_bytes(), re.S)]
    in_8_bits = [text for text in tensors if b"type=fp8_e4m3" in text]
    constants = [int(size) for text in in_8_bits for size in re.findall(rb"const_payload_size=(\d+)", text)]
    assert sum(constants) == WEIGHTS
    inputs = {re.search(rb"dims=\{ ([\d ]+) \}", text)[1].split()[-1] for text in in_8_bits if b"const" not in text}
    assert inputs == {str(TINY.dim).encode(), str(TINY.ffn_dim).encode()}


@needs_tensorrt
def test_a_network_that_lost_a_product_in_8_bits_is_refused(student):
    from cfpp_rt.export.trt.check_network import check_network
    from cfpp_rt.export.trt.library import load_library
    from cfpp_rt.export.trt.parser import parse

    library, (_, bundle) = load_library("tensorrt-rtx"), student
    network = parse(library, bundle.path("fused"))
    assert check_network(library, network, bundle.card.graphs["fused"]).float8_linears == 8 * TINY.num_layers
    lost = dataclasses.replace(network, source_float8=network.source_float8 + 1)
    with pytest.raises(InputError, match="the graph has 17 products of operands in 8 bits, the network 16"):
        check_network(library, lost, bundle.card.graphs["fused"])


@needs_tensorrt
def test_architectures_without_8_bits_are_refused_before_any_work():
    from cfpp_rt.export.trt.build import require_buildable

    with pytest.raises(InputError, match="targets must be sm89 or newer for linears in float8_e4m3, got sm80, sm86"):
        require_buildable("tensorrt-rtx", ["sm80", "sm86", "sm89"], None, None, linear_dtype=FLOAT8)
