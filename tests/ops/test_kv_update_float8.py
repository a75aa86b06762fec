"""kv_update_ into a float8 cache: stored bytes against plain PyTorch, rounding against float64."""

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops.kv_update import kv_update_
from cfpp_rt.reference.kv_update import kv_update_ as reference
from tests.ops.test_kv_update import BAD as BAD_ANYWAY
from tests.ops.test_kv_update import CASES, DEVICES, DTYPES, EPS, NAMES, Case

OPCHECKS = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
SENTINEL = 0xA5  # a byte of the cache that nobody writes by chance


def arguments_of(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The arguments of the ordinary call, with caches that are views of one float8 buffer, eps, and varied scales."""
    ordinary = case.arguments(dtype, device)
    shape = ordinary[0]._base.shape
    buffer = torch.full(shape, SENTINEL, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    caches = buffer[:, :, 1:, 1:-1]
    scales = 2.0 ** torch.arange(-4, 4)[torch.arange(2 * case.batch * case.heads) % 8].float() * 1.3
    return [*caches, *ordinary[2:], EPS, *scales.view(2, case.batch, case.heads).to(device)]


def codes(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8)


def buffer(arguments: list[Tensor]) -> Tensor:
    return codes(arguments[0]._base)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_are_rounded_to_nearest(case: Case, dtype: torch.dtype, device: str):
    ours, plain, ordinary = (
        arguments_of(case, dtype, device),
        arguments_of(case, dtype, device),
        case.arguments(dtype, device),
    )
    q = kv_update_(*ours)
    reference(*plain)
    assert torch.equal(q, kv_update_(*ordinary, EPS)), "queries know nothing of the cache's dtype"
    assert torch.equal(codes(ours[1]), codes(plain[1])), "the bytes of v"
    wide = [t.double() if t.dtype == dtype else t for t in case.arguments(dtype, device)]
    reference(*wide, EPS)
    written = wide[0].isfinite()
    for index, oracle in enumerate(wide[:2]):
        scale = ours[-2 + index][:, :, None, None].double().expand_as(oracle)[written]
        error = (ours[index].double()[written] * scale - oracle[written]).abs()
        # Half a step: 2^-4 of a normal number, 2^-10 of the scale below; 1e-5 for k itself, computed in float32.
        allowed = torch.maximum(oracle[written].abs() * 2.0**-4, scale * 2.0**-10) * 1.0001 + 1e-5
        assert bool((error <= allowed).all()), float((error - allowed).max())
    mask = torch.zeros_like(buffer(ours), dtype=torch.bool)
    mask[:, :, 1:, 1:-1] = torch.stack([written, written])
    assert bool((buffer(ours)[~mask] == SENTINEL).all()) and int(mask.sum()) == 2 * q.numel()


def numbers_of_every_kind(dtype: torch.dtype) -> Tensor:
    """All 2^16 numbers of a 16-bit dtype; for float32 as many: neighbours of every tie, and random bits."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, ties, torch.tensor([448.0, 464.0, 1e30, float("inf"), float("nan"), 2.0**-140])])
    near = (exact.view(torch.int32)[:, None] + torch.arange(-2, 3)).flatten().to(torch.int32).view(torch.float32)
    random = torch.randint(-(2**31), 2**31, (2**16 - 2 * len(near),), generator=torch.Generator().manual_seed(1))
    return torch.cat([near, -near, random.to(torch.int32).view(torch.float32)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**9, 0.3, 2.0**-126, 2.0**126])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 22], ids=["vectors", "tail"])
def test_bytes_are_equal_for_every_kind_of_number(head_dim: int, dtype: torch.dtype, scale: float, device: str):
    """k is +1 or -1 before its norm and is not rotated, so that the result is exactly the weights of the norm."""
    numbers = numbers_of_every_kind(dtype)
    heads = len(numbers) // head_dim
    width = heads * head_dim
    numbers = numbers[:width].to(device)
    sign = torch.where(torch.arange(width, device=device) % 3 == 0, -1.0, 1.0).to(dtype).view(1, 1, width)
    still = [torch.tensor([1.0, 0.0], device=device).repeat(1, 1, n, 1) for n in (head_dim // 2 - 2, 1, 1)]
    results = []
    for write in (kv_update_, reference):
        cache = torch.zeros(2, 1, heads, 1, head_dim, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        scales = torch.full((2, 1, heads), scale, device=device)
        index = torch.zeros(1, 1, dtype=torch.int32, device=device)
        write(
            *cache,
            *(sign, sign, numbers.view(1, 1, width), numbers, numbers),
            *(still[0], still[1][0], still[2][0], index),
            0.0,
            *scales,
        )
        results.append(codes(cache))
    assert torch.equal(results[0], results[1])
    saturated = results[0][1].flatten()[numbers.isinf()] & 0x7F
    assert bool((saturated == 0x7E).all()) and bool((results[0][1].flatten()[numbers.isnan()] == 0x7F).all())


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_are_bit_equal(device: str):
    case = CASES["1560 tokens of the 1.3B model"]
    first, second = arguments_of(case, torch.bfloat16, device), arguments_of(case, torch.bfloat16, device)
    assert torch.equal(kv_update_(*first), kv_update_(*second)) and torch.equal(buffer(first), buffer(second))


def test_float64_runs_the_reference():
    ours = [
        t.double() if i in range(2, 7) else t for i, t in enumerate(arguments_of(Case(columns=4), torch.float32, "cpu"))
    ]
    plain = [
        t.double() if i in range(2, 7) else t for i, t in enumerate(arguments_of(Case(columns=4), torch.float32, "cpu"))
    ]
    kv_update_(*ours)
    reference(*plain)
    assert torch.equal(buffer(ours), buffer(plain))


SCALED = [*NAMES, "eps", "k_scale", "v_scale"]
BAD = {
    "no scales": (
        ("k_scale", "v_scale"),
        lambda t: None,
        "k_scale and v_scale must be given for caches in torch.float8",
    ),
    "one scale": (("v_scale",), lambda t: None, "v_scale must be a tensor"),
    "the other scale": (("k_scale",), lambda t: None, "k_scale must be a tensor"),
    "scales of one batch row": (("k_scale",), lambda t: t[:1], r"k_scale must be \[B=2, H=3\], got \[1, 3\]"),
    "scales without batch": (("v_scale",), lambda t: t[0], r"v_scale must be \[B=2, H=3\], got \[3\]"),
    "scales in float64": (("v_scale",), lambda t: t.double(), "v_scale must be torch.float32, got torch.float64"),
    "ordinary caches": (
        ("k_cache", "v_cache"),
        lambda t: t.float(),
        "k_cache must be torch.float8_e4m3fn, got torch.float32",
    ),
    "one ordinary cache": (("v_cache",), lambda t: t.float(), "v_cache must be torch.float8_e4m3fn, got torch.float32"),
    "a scale of 0": (("k_scale",), lambda t: t * 0, r"k_scale.* must be in 2\^-126\.\.2\^126, got"),
    "a negative scale": (("v_scale",), lambda t: -t, r"v_scale.* must be in 2\^-126\.\.2\^126, got"),
    "a scale of NaN": (("v_scale",), lambda t: t * torch.nan, r"v_scale.* must be in 2\^-126\.\.2\^126, got"),
    "an infinite scale": (("k_scale",), lambda t: t * torch.inf, r"k_scale.* must be in 2\^-126\.\.2\^126, got"),
    "a scale without reciprocal": (("k_scale",), lambda t: t * 0 + 2.0**-140, r"k_scale.* must be in 2\^-126"),
    "index past the end": (("write_index",), BAD_ANYWAY["index past the end"][1], r"write_index.*must be in 0\.\.35"),
}


@pytest.mark.parametrize(("names", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named_and_nothing_is_written(names, change, message):
    arguments = arguments_of(Case(frames=2, rows=2, columns=3, groups=2, batch=2), torch.float32, "cpu")
    wrong = list(arguments)
    for name in names:
        wrong[SCALED.index(name)] = change(arguments[SCALED.index(name)])
    with pytest.raises(InputError, match=f"kv_update_: {message}"):
        kv_update_(*wrong)
    assert bool((buffer(arguments) == SENTINEL).all())


def test_scales_for_an_ordinary_cache_are_refused():
    arguments = Case(columns=3).arguments(torch.bfloat16, "cpu")
    with pytest.raises(InputError, match="k_cache must be torch.float8_e4m3fn, got torch.bfloat16"):
        kv_update_(*arguments, EPS, torch.ones(1, 3), torch.ones(1, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str):
    arguments = arguments_of(Case(frames=2, rows=2, columns=3, groups=2), torch.float32, device)
    arguments[:2] = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in arguments[:2]]
    # test_schema multiplies what it compares, which torch cannot in float8; the ordinary cache's opcheck runs it.
    torch.library.opcheck(torch.ops.cfpp_rt.kv_update_.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str):
    eager, compiled = (
        arguments_of(Case(frames=2, rows=2, columns=3, groups=2), torch.float32, "cpu") for _ in range(2)
    )
    call = torch.compile(lambda *tensors: kv_update_(*tensors) * 2, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(call(*compiled), kv_update_(*eager) * 2)
    assert torch.equal(buffer(compiled), buffer(eager))
