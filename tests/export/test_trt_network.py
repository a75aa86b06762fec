"""What TensorRT is given: lengths restored, every fault of a graph refused in one line before anything is built."""

import dataclasses

import pytest

from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.export.trt import library as libraries
from cfpp_rt.export.trt import parser
from cfpp_rt.export.trt.check_network import check_network
from cfpp_rt.export.trt.library import Library, load_library
from cfpp_rt.export.trt.messages import explain
from cfpp_rt.export.trt.parser import parse
from tests.export.graphs import cached_attention, contract
from tests.export.needs import needs_tensorrt

pytestmark = needs_tensorrt


@pytest.fixture(scope="module")
def library():
    return load_library("tensorrt-rtx")


def parsed(library, tmp_path, **options):
    return parse(library, cached_attention(tmp_path / "graph.onnx", **options))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_sound_graph_is_proven(library, tmp_path, dtype):
    report = check_network(library, parsed(library, tmp_path, dtype=dtype), contract(dtype))
    assert [(site.key_cache, site.value_cache) for site in report.sites] == [
        ("keys_0", "values_0"),
        ("keys_1", "values_1"),
    ]
    assert all(site.validity == "length" for site in report.sites), "the length reaches every attention"
    assert all(site.decomposable == (dtype == "float32") for site in report.sites)
    assert report.cross_attentions == 0
    assert report.inputs["keys_1"] == ((1, 2, 32, 16), dtype) and report.inputs["slot"] == ((1,), "int64")
    assert any("float32" in note for note in report.notes) == (dtype == "float32")


def test_the_parser_alone_drops_the_length(library, tmp_path, monkeypatch):
    """The reason why `parse` mends the network: without that step the length reaches nothing, and the proof says so."""
    monkeypatch.setattr(parser, "_restore_lengths", lambda *arguments: [])
    with pytest.raises(InputError, match="a0 sees the whole cache.*input length reaches no output"):
        check_network(library, parsed(library, tmp_path), contract())


@pytest.mark.parametrize(
    "fault,message",
    [
        ("no length", "attention Attention_a0 sees the whole cache: it has neither valid length nor mask"),
        ("no update", "output values_1_out must be a cache updated in place: it has no KV cache update"),
        ("circular", "TensorScatter must have mode=linear"),
        ("two updates", "cache keys_0 is updated twice"),
        ("shared cache", "attentions Attention_a0, Attention_a1 share cache keys_0: that crashes the builder"),
        ("decomposed", "attention is decomposed: softmax layer Softmax_weights"),
        ("unused input", "input action reaches no output"),
        ("keys as values", "attention Attention_a1 must read one cache of keys and one of values"),
        ("past keys", "Attention must have one output"),
    ],
)
def test_a_planted_fault_is_one_line(library, tmp_path, fault, message):
    with pytest.raises(InputError, match=message) as caught:
        check_network(library, parsed(library, tmp_path, fault=fault), contract())
    assert "\n" not in str(caught.value)


def test_a_network_of_another_dtype_shape_or_name_is_refused(library, tmp_path):
    found = parsed(library, tmp_path, dtype="bfloat16")
    with pytest.raises(InputError, match=r"input x must be float16 \[1, 8, 32\], got bfloat16.*and 9 more"):
        check_network(library, found, contract("float16"))
    spec = contract("bfloat16")
    shorter = dataclasses.replace(spec.inputs[5], shape=(1, 2, 24, 16))
    renamed = dataclasses.replace(spec.inputs[0], name="tokens")
    for wrong, message in (
        ((*spec.inputs[:5], shorter, *spec.inputs[6:]), r"keys_0 must be bfloat16 \[1, 2, 24, 16\], got .* 32, 16"),
        ((renamed, *spec.inputs[1:]), "input tokens is missing; input x is not in the contract"),
    ):
        with pytest.raises(InputError, match=message):
            check_network(library, found, dataclasses.replace(spec, inputs=wrong))


def test_an_output_that_continues_another_cache_is_refused(library, tmp_path):
    spec = contract()
    keys, values = spec.outputs[1], spec.outputs[2]
    crossed = (spec.outputs[0], dataclasses.replace(keys, updates=values.updates), *spec.outputs[2:])
    with pytest.raises(InputError, match="keys_0_out must be values_0 updated in place, it is keys_0"):
        check_network(library, parsed(library, tmp_path), dataclasses.replace(spec, outputs=crossed))


def test_missing_and_broken_files(library, tmp_path):
    with pytest.raises(InputError, match="nowhere.onnx: no such file"):
        parse(library, tmp_path / "nowhere.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0a truncated")
    with pytest.raises(InputError, match="broken.onnx: "):
        parse(library, tmp_path / "broken.onnx")


def test_architectures_and_what_to_do_on_hopper(library):
    for target in ("sm80", "sm86", "sm89", "sm120", "current"):
        library.require_target(target)
    with pytest.raises(InputError, match="target must be one of .*sm120.*, got 'sm61'"):
        library.require_target("sm61")
    with pytest.raises(InputError, match="no target for data centre GPUs after sm80.*--library tensorrt"):
        library.require_target("sm90")
    proper = Library("tensorrt", "11.1.0", None, None, [])
    proper.require_target("current")
    with pytest.raises(InputError, match="must be 'current' with TensorRT, got 'sm89'"):
        proper.require_target("sm89")


def test_a_log_that_admits_an_ignored_input_is_fatal():
    log = [("INFO", "Detected 9 inputs"), ("WARNING", "Unused Input: length"), ("VERBOSE", "Disabling unused tactic")]
    assert Library("tensorrt-rtx", "1.7", None, None, log).fatal_messages() == ["Unused Input: length"]


def test_an_absent_or_old_library_is_one_line(monkeypatch):
    fresh = load_library.__wrapped__

    def absent(module):
        raise ImportError(module)

    with monkeypatch.context() as patch:
        patch.setattr(libraries.importlib, "import_module", absent)
        with pytest.raises(MissingExtraError, match=r"pip install 'cfpp-rt\[tensorrt\]'"):
            fresh("auto")
        with pytest.raises(MissingExtraError, match=r"pip install 'cfpp-rt\[tensorrt-gpu\]'"):
            fresh("tensorrt")

    class Old:
        __version__ = "10.9.0"
        IAttention = IRotaryEmbeddingLayer = None

    with monkeypatch.context() as patch:
        patch.setattr(libraries.importlib, "import_module", lambda module: Old)
        with pytest.raises(
            InputError, match="tensorrt 10.9.0 has no IKVCacheUpdateLayer.*pip install --upgrade tensorrt"
        ):
            fresh("tensorrt")
    with pytest.raises(InputError, match="library must be auto, tensorrt-rtx or tensorrt, got 'trt'"):
        fresh("trt")


def test_error_texts_are_explained_on_one_line():
    text = "Error Code 1: Myelin ([graph]\n graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed."
    assert explain(text).startswith("refittable and stripped weights need a GPU driver") and "\n" not in explain(text)
    assert explain("something\nnew") == "something new"
