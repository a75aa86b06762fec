"""kv_dequantize_ against plain PyTorch, and the error of attention over a float8 cache against float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.errors import InputError
from cfpp_rt.ops import backends
from cfpp_rt.ops.block_attention import block_attention
from cfpp_rt.ops.kv_dequantize import kv_dequantize_
from cfpp_rt.ops.token_ranges import TokenRanges
from cfpp_rt.reference.block_attention import block_attention as attention_reference
from cfpp_rt.reference.kv_dequantize import kv_dequantize_ as reference
from cfpp_rt.reference.kv_update import to_float8
from tests.ops.backends import bits
from tests.ops.test_kv_update import DEVICES, DTYPES
from tests.ops.test_kv_update_float8 import OPCHECKS

SENTINEL = 2736.0  # 171 * 16: too many bits to be a code times a power of two
ONE = (((0, 7),),)


@dataclasses.dataclass(frozen=True)
class Case:
    ranges: tuple[tuple[tuple[int, int], ...], ...] = ONE
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    capacity: int = 40

    def arguments(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Strided views of larger buffers; codes of every kind, NaN included."""
        generator = torch.Generator().manual_seed(3)
        shape = (2, self.batch, self.heads + 1, self.capacity + 2, self.head_dim)
        codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).to(device)[:, :, 1:, 1:-1]
        out = torch.full(shape, SENTINEL, device=device).to(dtype)[:, :, 1:, 1:-1]
        scales = 2.0 ** torch.randint(-9, 9, (2, self.batch, self.heads), generator=generator).float()
        ranges = TokenRanges.of(self.ranges, capacity=self.capacity, batch=self.batch, device=device)
        return [*out, *codes.view(torch.float8_e4m3fn), *scales.to(device), ranges.device]


CASES = {
    "one range": Case(),
    "everything": Case((((0, 40),),)),
    "several ranges in any order": Case((((30, 40), (3, 4), (10, 20)),)),
    "two groups that overlap": Case((((0, 10), (30, 40)), ((5, 20),))),
    "two groups, the same": Case((((0, 10),), ((0, 10),))),
    "batch": Case((((0, 10), (30, 40)), ((5, 20),)), batch=3),
    "head of 128": Case((((3, 39),),), heads=3, head_dim=128),
    "head with a tail": Case((((3, 39),),), head_dim=22),
    "smallest head": Case((((3, 39),),), head_dim=2),
    "large enough to stream": Case((((3, 1500), (1600, 3000)),), heads=12, head_dim=128, capacity=3000),
}


def call(*arguments: Tensor) -> None:
    torch.ops.cfpp_rt.kv_dequantize_(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_plain_pytorch_and_changes_nothing_else(case: Case, dtype: torch.dtype, device: str):
    ours, plain = case.arguments(dtype, device), case.arguments(dtype, device)
    call(*ours)
    reference(*plain)
    for index in range(2):
        mine, wanted = ours[index], plain[index]
        assert torch.equal(mine.isnan(), wanted.isnan())
        assert torch.equal(bits(mine.nan_to_num(nan=1.0)), bits(wanted.nan_to_num(nan=1.0)))
    untouched = ours[0]._base == torch.full((), SENTINEL, dtype=dtype, device=device)
    visible = {t for ranges in case.ranges for first, last in ranges for t in range(first, last)}
    assert int((~untouched).sum()) == 2 * case.batch * case.heads * len(visible) * case.head_dim


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-20, 1.0, 0.3, 2.0**12, 2.0**126])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_exact_or_saturates(dtype: torch.dtype, scale: float, device: str):
    cache = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 1, 256).view(torch.float8_e4m3fn)
    out = torch.zeros(2, 1, 1, 1, 256, dtype=dtype, device=device)
    scales = torch.full((1, 1), scale, device=device)
    call(*out, cache, cache, scales, scales, torch.tensor([[[[0, 1]]]], dtype=torch.int32, device=device))
    assert torch.equal(bits(out[0].nan_to_num(nan=1.0)), bits(out[1].nan_to_num(nan=1.0)))
    largest = torch.finfo(dtype).max
    exact = (cache.double() * scales.double()).clamp(-largest, largest).to(torch.float32).to(dtype)
    assert torch.equal(out[0].isnan(), cache.isnan()) and not bool(out.isinf().any())
    assert torch.equal(out[0].nan_to_num(nan=1.0), exact.nan_to_num(nan=1.0))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int):
    case = dataclasses.replace(CASES["two groups that overlap"], capacity=900, head_dim=128, ranges=(((5, 801),),))
    wanted, ours = case.arguments(torch.bfloat16, "cpu"), case.arguments(torch.bfloat16, "cpu")
    call(*wanted)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        call(*ours)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(ours[0]._base), bits(wanted[0]._base))


@pytest.mark.gpu
def test_one_captured_graph_serves_changing_ranges():
    arguments = Case((((0, 10), (20, 30)),)).arguments(torch.bfloat16, "cuda")
    call(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*arguments)
    for pairs in ([[0, 7], [0, 0]], [[3, 9], [30, 40]]):
        fresh = Case((tuple((a, b) for a, b in pairs if b),)).arguments(torch.bfloat16, "cuda")
        arguments[0]._base.fill_(SENTINEL)
        arguments[-1].copy_(torch.tensor([[pairs]], dtype=torch.int32))
        graph.replay()
        reference(*fresh)
        assert torch.equal(arguments[0]._base.nan_to_num(nan=1.0), fresh[0]._base.nan_to_num(nan=1.0))


def test_float64_runs_the_reference():
    ours = [t.double() if i < 2 else t for i, t in enumerate(Case().arguments(torch.float32, "cpu"))]
    plain = [t.clone() for t in ours]
    call(*ours)
    reference(*plain)
    assert torch.equal(ours[1].nan_to_num(nan=1.0), plain[1].nan_to_num(nan=1.0))


NAMES = ["k_out", "v_out", "k_cache", "v_cache", "k_scale", "v_scale", "ranges"]
BAD = {
    "keys of three dimensions": ("k_cache", lambda t: t[0], r"k_cache must be \[B, H, capacity, even D\]"),
    "odd head": ("k_cache", lambda t: t[..., 1:], r"k_cache must be \[B, H, capacity, even D\]"),
    "values of another capacity": (
        "v_cache",
        lambda t: t[:, :, 1:],
        r"v_cache must be \[B=1, H=2, capacity=40, D=32\]",
    ),
    "room of another capacity": ("v_out", lambda t: t[:, :, 1:], "v_out must be"),
    "room of two dtypes": ("v_out", lambda t: t.half(), "v_out must be torch.float32( like k_out)?, got torch.float16"),
    "ordinary keys": ("k_cache", lambda t: t.float(), "k_cache must be torch.float8_e4m3fn, got torch.float32"),
    "strided channels": ("v_out", lambda t: t.mT.contiguous().mT, "v_out must be contiguous in its last dimension"),
    "scales per layer": ("k_scale", lambda t: t[None], r"k_scale must be \[B=1, H=2\], got \[1, 1, 2\]"),
    "scales in bfloat16": ("v_scale", lambda t: t.bfloat16(), "v_scale must be torch.float32, got torch.bfloat16"),
    "ranges in int64": ("ranges", lambda t: t.long(), "ranges must be torch.int32, got torch.int64"),
    "ranges for another batch": ("ranges", lambda t: t.repeat(2, 1, 1, 1), r"ranges must be \[B=1, G, R, 2\]"),
    "ranges past the end": ("ranges", lambda t: t + 34, r"ranges\[0.*must be .*capacity 40, got \[34, 41\)"),
    "ranges that are negative": ("ranges", lambda t: t - 1, r"ranges\[0.*got \[-1, 6\)"),
}


@pytest.mark.parametrize("attend", [call, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(("name", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named_and_nothing_is_written(name, change, message, attend):
    arguments = Case().arguments(torch.float32, "cpu")
    wrong = list(arguments)
    wrong[NAMES.index(name)] = change(arguments[NAMES.index(name)])
    if attend is reference and "capacity 40" not in message and "-1" not in message:
        pytest.skip("the op checks what the reference then takes for granted")
    with pytest.raises(InputError, match=f"kv_dequantize_: {message}"):
        attend(*wrong)
    assert bool((arguments[0]._base == torch.tensor(SENTINEL)).all())


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str):
    arguments = [t.contiguous() for t in Case().arguments(torch.float32, device)]
    torch.library.opcheck(torch.ops.cfpp_rt.kv_dequantize_.default, arguments, test_utils=OPCHECKS)


def test_compiles_as_one_graph():
    eager, compiled = (Case().arguments(torch.float32, "cpu") for _ in range(2))
    ranges = TokenRanges.of(ONE, capacity=40, batch=1, device="cpu")
    run = torch.compile(lambda *a: kv_dequantize_(*a, ranges), fullgraph=True, backend="aot_eager")
    kv_dequantize_(*eager[:-1], ranges)
    run(*compiled[:-1])
    assert torch.equal(eager[0]._base.nan_to_num(nan=1.0), compiled[0]._base.nan_to_num(nan=1.0))


def test_the_kernel_runs_and_not_the_reference():
    assert backends()["kv_dequantize_"]["cpu"][0] == "cpu", backends()


def filled_cache(
    dtype: torch.dtype, device: str, heads: int = 4, head_dim: int = 64, frames: int = 6, tokens: int = 260
):
    """A cache of one layer with NaN in every row, then random keys and values in the visible rows."""
    shape = CacheShape(1, 1, heads, frames, tokens, head_dim)
    cache = KVCache(shape, FrameRing(0, frames, 1), dtype, device, torch.float8_e4m3fn)
    layer = cache.layers[0]
    generator = torch.Generator().manual_seed(5)
    size = (1, heads, frames * tokens, head_dim)
    keys, values = (torch.randn(size, generator=generator).to(dtype).to(device) for _ in range(2))
    q = torch.randn(1, heads, tokens, head_dim, generator=generator).to(dtype).to(device)
    layer.set_scales(keys.new_ones(heads * head_dim), values.transpose(1, 2).flatten(2))
    cache.data.view(torch.uint8).fill_(0x7F)
    for tensor in layer._dequantized:
        tensor.fill_(float("nan"))
    groups = [[(0, tokens), (2 * tokens, 4 * tokens)]]
    ranges = TokenRanges.of(groups, capacity=frames * tokens, batch=1, device=device)
    for first, last in groups[0]:
        layer.keys[:, :, first:last] = to_float8(keys, layer.scales[0])[:, :, first:last]
        layer.values[:, :, first:last] = to_float8(values, layer.scales[1])[:, :, first:last]
    return layer, q, keys, values, ranges


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_attention_over_a_float8_cache(dtype: torch.dtype, device: str):
    """Against float64 over unquantised keys and values: numbers that err by 2.5 % (rms) make outputs that err by less
    than 5 %. Against float64 over the stored numbers, attention is as good as over an ordinary cache."""
    layer, q, keys, values, ranges = filled_cache(dtype, device)
    scale = q.shape[-1] ** -0.5
    read = layer.readable(ranges)
    out = block_attention(q, *read, ranges).double()
    assert bool(out.isfinite().all()), "unused rows are NaN, stored and dequantized"

    def exact(k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q.double(), k.double(), v.double(), ranges.device, scale)

    oracle, stored = exact(keys, values), exact(*read)
    loss = float((out - oracle).square().mean().sqrt() / oracle.square().mean().sqrt())
    assert 0.005 < loss < 0.05, loss
    ordinary = attention_reference(q, *read, ranges.device, scale).double()
    assert float((out - stored).abs().max()) <= 2 * float((ordinary - stored).abs().max()) + 1e-7
