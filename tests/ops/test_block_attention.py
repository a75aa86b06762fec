"""block_attention against plain PyTorch; float64 is the oracle."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops import backends
from cfpp_rt.ops.attention_libraries import FLASH_MODULES, LIBRARY_BACKENDS, attend_gathered, flash_module
from cfpp_rt.ops.attention_table import BACKENDS, Problem, choose_attention, kernel_supports
from cfpp_rt.ops.block_attention import block_attention
from cfpp_rt.ops.token_ranges import TokenRanges
from cfpp_rt.reference.block_attention import block_attention as reference
from tests.closeness import assert_no_worse_than

GPU = pytest.mark.gpu
# The kernels' dtypes, on the device where they have them.
TARGETS = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
    pytest.param("cpu", torch.float16, id="cpu-float16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=GPU),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=GPU),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@dataclasses.dataclass(frozen=True)
class Case:
    queries: int  # per group
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    heads: int = 2
    head_dim: int = 64
    batch: int = 1
    slack: int = 9  # cache rows after the last visible one
    sharpness: float = 1.0  # of the softmax

    @property
    def capacity(self) -> int:
        return max(last for visible in self.ranges for _, last in visible) + self.slack

    def arguments(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, TokenRanges]:
        """q and the caches are strided views of larger buffers; every row outside the ranges of all groups is NaN."""
        generator = torch.Generator().manual_seed(11)
        total = self.queries * len(self.ranges)
        q = torch.randn(self.batch, self.heads, total + 3, self.head_dim, generator=generator) * self.sharpness
        shape = (2, self.batch, self.heads + 1, self.capacity + 2, self.head_dim)
        caches = torch.randn(shape, generator=generator)
        visible = torch.zeros(self.capacity + 2, dtype=torch.bool)
        for ranges in self.ranges:
            for first, last in ranges:
                visible[1 + first : 1 + last] = True
        caches[:, :, :, ~visible] = float("nan")
        keys, values = caches.to(device, dtype)[:, :, 1:, 1:-1]
        ranges = TokenRanges.of(self.ranges, capacity=self.capacity, batch=self.batch, device=device)
        return q.to(device, dtype)[:, :, 2:-1], keys, values, ranges


def one(*ranges: tuple[int, int]) -> tuple[tuple[tuple[int, int], ...]]:
    return (ranges,)


CASES = {
    "one query, one key": Case(1, one((0, 1))),
    "one query, one key, far in": Case(1, one((777, 778)), head_dim=128),
    "127 queries, 15 keys": Case(127, one((3, 18))),
    "128 queries, 16 keys": Case(128, one((3, 19))),
    "129 queries, 17 keys": Case(129, one((3, 20)), head_dim=128),
    "63 keys": Case(30, one((1, 64))),
    "65 keys": Case(30, one((1, 66)), head_dim=128),
    "175 keys": Case(64, one((5, 180)), head_dim=128),
    "176 keys": Case(65, one((5, 181)), head_dim=128),
    "177 keys": Case(65, one((5, 182)), head_dim=128),
    "353 keys": Case(200, one((0, 353)), head_dim=128),
    "the full capacity": Case(40, one((0, 300)), slack=0),
    "130 keys, odd query tile": Case(33, one((1, 131)), head_dim=128),
    "257 keys": Case(17, one((0, 257))),
    "ranges that touch": Case(20, one((0, 10), (10, 20))),
    "three ranges": Case(50, one((0, 33), (100, 101), (150, 400)), head_dim=128),
    "ranges in any order": Case(50, one((150, 300), (0, 33))),
    "two groups that see different windows": Case(77, (((0, 100), (300, 377)), ((50, 377),)), head_dim=128),
    "two groups of different range counts": Case(33, (((10, 90),), ((0, 10), (90, 91), (200, 280))), batch=2),
    "three groups": Case(20, (((0, 20),), ((0, 40),), ((0, 60),))),
    "batch of 3": Case(70, one((0, 70), (80, 200)), batch=3, heads=3),
    "sharp softmax": Case(64, one((0, 500)), sharpness=20.0, head_dim=128),
    "one frame of the 1.3B model, three visible": Case(1560, one((0, 4680)), heads=1, head_dim=128),
}
SMALL_HEADS = {
    "head of 32": Case(49, one((0, 36), (72, 180)), head_dim=32, heads=4),
    "head of 48": Case(49, one((0, 36), (72, 181)), head_dim=48, heads=4),
    "head of 80": Case(17, one((3, 132)), head_dim=80),
    "head of 6": Case(5, one((2, 70)), head_dim=6),
}


def check(case: Case, dtype: torch.dtype, device: str, attend) -> None:
    arguments = case.arguments(dtype, device)
    scale = case.head_dim**-0.5
    tensors = (*arguments[:3], arguments[3].device)
    ours = attend(*arguments, scale)
    assert ours.shape == (case.batch, case.queries * len(case.ranges), case.heads * case.head_dim)
    assert ours.is_contiguous() and ours.dtype == dtype
    oracle = reference(*(t.double() if t.is_floating_point() else t for t in tensors), scale)
    plain = reference(*tensors, scale)
    assert_no_worse_than(ours, plain, oracle, floor=1e-7, name="out")


def kernel(q: Tensor, keys: Tensor, values: Tensor, ranges: TokenRanges, scale: float) -> Tensor:
    return torch.ops.cfpp_rt.block_attention(q, keys, values, ranges.device, scale)


@pytest.mark.parametrize("device,dtype", TARGETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_agrees_with_float64(case: Case, device: str, dtype: torch.dtype):
    check(case, dtype, device, kernel)


@pytest.mark.parametrize("device,dtype", TARGETS)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale_is_supported_on_the_cpu(scale: float, device: str, dtype: torch.dtype):
    q, keys, values, ranges = CASES["three ranges"].arguments(dtype, device)
    if device == "cuda":
        with pytest.raises(InputError, match=f"scale must be above 0 on CUDA, got {scale}"):
            kernel(q, keys, values, ranges, scale)
        return
    wide = (t.double() for t in (q, keys, values))
    oracle, plain = reference(*wide, ranges.device, scale), reference(q, keys, values, ranges.device, scale)
    assert_no_worse_than(kernel(q, keys, values, ranges, scale), plain, oracle, floor=1e-7)


@pytest.mark.parametrize("device,dtype", TARGETS)
def test_nan_reaches_exactly_the_groups_that_attend_to_it(device: str, dtype: torch.dtype):
    q, keys, values, ranges = Case(20, (((0, 40),), ((0, 41),))).arguments(dtype, device)
    values[:, :, 40] = float("nan")
    out = kernel(q, keys, values, ranges, 0.1)
    assert bool(out[:, :20].isfinite().all()) and bool(out[:, 20:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL_HEADS.values(), ids=SMALL_HEADS.keys())
def test_cpu_kernel_supports_every_even_head_dim(case: Case, dtype: torch.dtype):
    check(case, dtype, "cpu", kernel)


@pytest.mark.parametrize("case", [*CASES.values(), *SMALL_HEADS.values()], ids=[*CASES, *SMALL_HEADS])
def test_the_public_function_agrees_for_every_choice_of_the_table(case: Case):
    check(case, torch.float32, "cpu", block_attention)


@pytest.mark.parametrize(
    "device,library", [("cpu", "sdpa"), *(pytest.param("cuda", n, marks=GPU) for n in LIBRARY_BACKENDS)]
)
def test_libraries_agree_with_float64(device: str, library: str):
    if library == "flash" and flash_module() is None:
        pytest.skip("FlashAttention is not installed")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = CASES["two groups that see different windows"]
    check(case, dtype, device, lambda *arguments: attend_gathered(LIBRARY_BACKENDS[library], *arguments))


@pytest.mark.parametrize("device,dtype", TARGETS)
def test_two_runs_are_bit_equal_and_do_not_depend_on_the_batch(device: str, dtype: torch.dtype):
    case = Case(300, (((0, 700),), ((100, 800),)), batch=3, head_dim=128)
    q, keys, values, ranges = case.arguments(dtype, device)
    first, second = (kernel(q, keys, values, ranges, 0.1) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int):
    q, keys, values, ranges = Case(200, one((0, 500)), head_dim=128).arguments(torch.bfloat16, "cpu")
    wanted = kernel(q, keys, values, ranges, 0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kernel(q, keys, values, ranges, 0.1), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_one_captured_graph_serves_changing_ranges():
    q, keys, values, ranges = Case(200, one((0, 100), (200, 500)), head_dim=128).arguments(torch.bfloat16, "cuda")
    keys.nan_to_num_()
    values.nan_to_num_()
    visible = ranges.device.clone()
    kernel(q, keys, values, dataclasses.replace(ranges, device=visible), 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, keys, values, dataclasses.replace(ranges, device=visible), 0.1)
    for pairs in ([[0, 17], [0, 0]], [[3, 180], [300, 301]], [[0, 509], [0, 0]]):
        visible.copy_(torch.tensor([[pairs]], dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, kernel(q, keys, values, dataclasses.replace(ranges, device=visible), 0.1))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, keys, values, ranges = Case(20, one((0, 40))).arguments(dtype, device)
    arguments = (q, keys.nan_to_num(), values.nan_to_num(), ranges.device, 0.1)
    torch.library.opcheck(torch.ops.cfpp_rt.block_attention.default, arguments)


def test_compiles_as_one_graph():
    arguments = Case(20, one((0, 40))).arguments(torch.float32, "cpu")
    compiled = torch.compile(lambda *a: block_attention(*a) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), block_attention(*arguments) * 2)


BAD_RANGES = {
    "past the end": ([[0, 10], [30, 300]], r"49.*got.*\[30, 300"),
    "negative": ([[-1, 10], [0, 0]], r"49.*got.*\[-1, 10"),
    "empty": ([[5, 5], [0, 1]], r"got.*\[5, 5"),
    "backwards": ([[0, 3], [9, 7]], r"got.*\[9, 7"),
    "overlapping": ([[0, 10], [9, 12]], "apart from|disjoint"),
    "none": ([[0, 0], [0, 0]], "one token"),
}


@pytest.mark.parametrize("attend", [torch.ops.cfpp_rt.block_attention, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(("pairs", "message"), BAD_RANGES.values(), ids=BAD_RANGES.keys())
def test_bad_ranges_are_refused(pairs, message, attend):
    q, keys, values, _ = Case(4, one((0, 40))).arguments(torch.float32, "cpu")
    with pytest.raises(InputError, match=rf"block_attention: ranges\[0, 0.*({message})"):
        attend(q, keys, values, torch.tensor([[pairs]], dtype=torch.int32), 1.0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[(0, 11)]], r"within 0\.\.10 and not empty, got \[0, 11\]"),
        ([[(-1, 3)]], r"got \[-1, 3\]"),
        ([[(3, 3)]], r"not empty, got \[3, 3\]"),
        ([[(0, 4)], [(0, 4), (3, 5)]], "group 1 must not overlap"),
        ([[(0, 4)], []], "group 1 must contain at least one token"),
        ([], "at least one group"),
    ],
)
def test_ranges_are_checked_on_the_host(groups, message):
    with pytest.raises(InputError, match=message):
        TokenRanges.of(groups, capacity=10, batch=1, device="cpu")


BAD = {
    "q of three dimensions": (0, lambda t: t[0], r"q must be \[B, H, Sq, D\]"),
    "no queries": (0, lambda t: t[:, :, :0], "q must be .*0"),
    "q of another dtype": (0, lambda t: t.half(), "must be torch.float16|must be float16"),
    "q with strided channels": (0, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), "q must be contiguous"),
    "keys of other heads": (1, lambda t: t[:, 1:], r"k_cache must be \[B=1, H=2, capacity, D=64\]"),
    "values of another capacity": (2, lambda t: t[:, :, 1:], "v_cache must be"),
    "ranges in int64": (3, lambda t: t.long(), "ranges must be torch.int32, got torch.int64"),
    "ranges for another batch": (3, lambda t: t.repeat(2, 1, 1, 1), r"ranges must be \[B=1, G, R, 2\]"),
    "groups that do not divide": (3, lambda t: t.repeat(1, 3, 1, 1), r"ranges must be .*divisor of Sq=4"),
}


@pytest.mark.parametrize(("index", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(index, change, message):
    q, keys, values, ranges = Case(4, one((0, 40))).arguments(torch.float32, "cpu")
    arguments = [q, keys, values, ranges.device]
    arguments[index] = change(arguments[index])
    with pytest.raises(InputError, match=f"block_attention: .*({message})"):
        torch.ops.cfpp_rt.block_attention(*arguments, 1.0)


def test_gradients_are_refused():
    q, keys, values, ranges = Case(4, one((0, 40))).arguments(torch.float32, "cpu")
    with pytest.raises(InputError, match="has no gradient"):
        block_attention(q.clone().requires_grad_(), keys, values, ranges)


def test_the_kernel_runs_and_not_the_reference():
    """Otherwise every comparison above would compare the reference with itself."""
    assert backends()["block_attention"]["cpu"][0] == "cpu", backends()


def test_the_table_names_known_backends_for_every_problem():
    for device_type, capability in (("cpu", (0, 0)), *(("cuda", c) for c in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for head_dim in (32, 64, 128):
                for queries in (1, 64, 1560, 4680):
                    problem = Problem(device_type, capability, dtype, head_dim, queries, 3 * queries)
                    name, reason = choose_attention(problem)
                    assert name in BACKENDS and reason
                    assert name != "kernel" or kernel_supports(problem)


@pytest.fixture
def forget_choices():
    """Clear the cached CFPP_BACKEND, which is read once per process, before and after a test that changes it."""
    module = sys.modules[block_attention.__module__]
    module._forced.cache_clear()
    yield
    module._forced.cache_clear()


@pytest.mark.parametrize("backend", ["sdpa", "kernel", "flash"])
def test_an_attention_backend_can_be_forced(backend: str, monkeypatch, forget_choices):
    monkeypatch.setenv("CFPP_BACKEND", backend)
    if backend == "flash":
        if flash_module() is not None:
            pytest.skip("FlashAttention is installed, and takes CUDA tensors only")
        with pytest.raises(InputError, match="CFPP_BACKEND=flash cannot be met"):
            check(CASES["three ranges"], torch.float32, "cpu", block_attention)
    else:
        check(CASES["three ranges"], torch.float32, "cpu", block_attention)


@pytest.mark.parametrize("version,module", FLASH_MODULES)
def test_flash_attention_is_found_under_each_of_its_names(version: int, module: str, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == module or None)
    assert flash_module.__wrapped__() == (version, module)
