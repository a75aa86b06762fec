"""The CUDA kernels of block_attention, executed on the host by tests/emulator: every machine tests their source."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.reference.block_attention import block_attention as reference
from tests.closeness import assert_no_worse_than
from tests.emulator.attention import COMPILER, DEVICES, SOURCES, EmulatedAttention, compile_for_host

DTYPES = [torch.bfloat16, torch.float16]
SENTINEL = 777.0
MARGIN = 256  # sentinels before and after the output

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no host compiler")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> EmulatedAttention:
    folder = tmp_path_factory.mktemp("emulated")
    return EmulatedAttention(folder, [compile_for_host(source, folder) for source in SOURCES])


@dataclasses.dataclass(frozen=True)
class Case:
    queries: int = 16
    ranges: tuple = ((((0, 64),),),)  # [B][G][R](first, last)
    heads: int = 1
    ctas: int = 0
    splits: int = 1

    def arguments(self, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
        """q, k, v as strided views of NaN; rows of the cache that nobody sees are NaN too."""
        generator = torch.Generator().manual_seed(11)
        ranges = torch.tensor(self.ranges, dtype=torch.int32)
        batch, capacity = len(self.ranges), int(ranges.max()) + 3
        nan = float("nan")
        q = torch.full((batch, self.queries + 2, self.heads + 1, head_dim), nan, dtype=dtype)
        q = q[:, 1:-1, 1:].transpose(1, 2)  # [B, H, Sq, D], as a view of a projection
        k, v = torch.full((2, batch, self.heads + 1, capacity, head_dim), nan, dtype=dtype)[:, :, 1:]
        q.copy_(torch.randn(q.shape, generator=generator) * 2)
        for b, groups in enumerate(self.ranges):
            for first, last in (pair for group in groups for pair in group):
                for cache in (k, v):
                    cache[b, :, first:last] = torch.randn(self.heads, last - first, head_dim, generator=generator)
        return [q, k, v, ranges]


def one(*ranges: tuple[int, int]) -> tuple:
    """One batch row, one group."""
    return ((ranges,),)


CASES = {
    **{f"{n} queries": Case(queries=n, ranges=one((5, 75))) for n in (1, 16, 127, 128, 129, 200)},
    **{
        f"range of {n}": Case(queries=20, ranges=one((7, 7 + n))) for n in (1, 15, 16, 17, 31, 33, 63, 64, 65, 128, 130)
    },
    "ends with the cache": Case(ranges=one((2, 99), (99, 102))),
    "several ranges": Case(queries=33, ranges=one((70, 71), (0, 0), (3, 68), (0, 0), (80, 145))),
    "two groups": Case(queries=2 * 40, ranges=((((0, 50), (0, 0)), ((0, 20), (60, 121))),), heads=2),
    "groups of 129": Case(queries=2 * 129, ranges=((((0, 9),), ((9, 30),)),)),
    "batch of two": Case(queries=18, ranges=((((0, 40),), ((40, 90),)), (((33, 73),), ((5, 6),))), heads=3),
    "one cta": Case(queries=140, ranges=one((0, 70)), heads=2, ctas=1),
    "two waves, no split": Case(queries=100, ranges=one((0, 40)), heads=5, ctas=2),
    "remainder in 2": Case(queries=40, ranges=one((0, 40), (50, 130)), heads=3, ctas=2, splits=2),
    "remainder in 3, two tiles": Case(queries=129, ranges=one((0, 200)), heads=3, ctas=4, splits=3),
    "all tiles split": Case(queries=70, ranges=((((0, 130),), ((9, 77),)),), heads=1, ctas=8, splits=3),
    "more pieces than tiles of keys": Case(queries=20, ranges=one((3, 40)), ctas=7, splits=8),
}


def run(emulated: EmulatedAttention, arguments: list[Tensor], device: str, **options) -> Tensor:
    """The output, after a look at what surrounds it."""
    q = arguments[0]
    batch, heads, queries, head_dim = q.shape
    memory = torch.full((q.numel() + 2 * MARGIN,), SENTINEL, dtype=q.dtype)
    out = memory[MARGIN:-MARGIN].view(batch, queries, heads, head_dim)
    out.fill_(float("nan"))
    emulated(out, *arguments, head_dim**-0.5, device=device, **options)
    assert bool((memory[:MARGIN] == SENTINEL).all() and (memory[-MARGIN:] == SENTINEL).all())
    return out.flatten(2)


def cases() -> list:
    """Every case on every device and head size; the dtypes take turns, so that each kernel meets both many times."""
    picks = list(itertools.product(CASES.items(), DEVICES, (64, 128)))
    return [
        pytest.param(case, device, head_dim, DTYPES[i // 2 % 2], id=f"{name}-{device}-{head_dim}")
        for i, ((name, case), device, head_dim) in enumerate(picks)
    ]


@pytest.mark.parametrize(("case", "device", "head_dim", "dtype"), cases())
def test_agrees_with_float64(emulated, case: Case, device: str, head_dim: int, dtype: torch.dtype):
    arguments = case.arguments(dtype, head_dim)
    wide = [t.double() if t.dtype == dtype else t for t in arguments]
    scale = head_dim**-0.5
    ours = run(emulated, arguments, device, ctas=case.ctas, splits=case.splits, seed=1)
    # Where few keys are seen plain PyTorch may err by nothing at all; half a unit in the last place is always allowed.
    oracle = reference(*wide, scale)
    floor = torch.finfo(dtype).eps * float(oracle.abs().max()) / 2
    assert_no_worse_than(ours, reference(*arguments, scale), oracle, floor=floor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["several ranges", "remainder in 3, two tiles", "more pieces than tiles of keys"])
def test_bits_do_not_depend_on_the_order_of_threads_and_ctas(emulated, name: str, device: str):
    case = CASES[name]
    arguments = case.arguments(torch.bfloat16, 128)
    first, *others = (
        run(emulated, arguments, device, ctas=case.ctas, splits=case.splits, seed=seed) for seed in (0, 2, 3, 4)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("device", DEVICES)
def test_the_dispatcher_takes_the_plan_of_the_device(emulated, device: str):
    """Three SMs: tiles enough for a full wave and a remainder on each emulated device."""
    case = Case(queries=130, ranges=one((0, 150)), heads=4)
    arguments = case.arguments(torch.bfloat16, 128)
    ours = run(emulated, arguments, device)
    oracle = reference(*(t.double() for t in arguments[:3]), arguments[3], 128**-0.5)
    assert_no_worse_than(ours, reference(*arguments, 128**-0.5), oracle)


def test_large_logits_and_rising_maxima(emulated):
    """Logits of hundreds, the largest of a row in its last tile: the running maximum has to move, and far."""
    q, k, v, ranges = Case(queries=40, ranges=one((0, 200))).arguments(torch.bfloat16, 128)
    k *= torch.linspace(0.1, 40, k.shape[2])[:, None].to(k.dtype)
    oracle = reference(q.double(), k.double(), v.double(), ranges, 128**-0.5)
    for device in DEVICES:
        ours = run(emulated, [q, k, v, ranges], device)
        assert_no_worse_than(ours, reference(q, k, v, ranges, 128**-0.5), oracle)


BAD_RANGES = {
    "past the cache": one((0, 68)),
    "negative": one((-1, 5)),
    "empty but not (0, 0)": one((3, 3)),
    "backwards": one((9, 3)),
    "nothing seen": one((0, 0), (0, 0)),
    "in the second group": ((((0, 5),), ((60, 99),)),),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranges", BAD_RANGES.values(), ids=BAD_RANGES.keys())
def test_bad_ranges_trap(emulated, ranges: tuple, device: str):
    q, k, v, _ = Case().arguments(torch.bfloat16, 64)  # capacity 67
    out = torch.empty(1, 16, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="trap"):
        emulated(out, q, k, v, torch.tensor(ranges, dtype=torch.int32), 0.125, device=device)


def misaligned(t: Tensor) -> Tensor:
    """The same values, one element past an aligned address."""
    moved = torch.empty(t.numel() + 8, dtype=t.dtype)[1 : t.numel() + 1].view(t.shape)
    return moved.copy_(t)


BAD = {
    "float32": (lambda q, k, v: (q.float(), k.float(), v.float()), "q must be torch.bfloat16 or torch.float16"),
    "head_dim": (lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32]), "head_dim must be 64 or 128 .* got 32"),
    "q": (lambda q, k, v: (misaligned(q), k, v), "q must be aligned to 16 bytes"),
    "k_cache": (lambda q, k, v: (q, misaligned(k), v), "k_cache must be aligned to 16 bytes"),
    "v_cache": (
        lambda q, k, v: (q, k, torch.cat([v, v], -1)[..., :68].contiguous()[..., :64]),
        "v_cache must be .* 68",
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_what_the_kernels_cannot_take_is_named(emulated, change, message: str, device: str):
    q, k, v, ranges = Case().arguments(torch.bfloat16, 64)
    q, k, v = change(q, k, v)
    with pytest.raises(InputError, match=f"block_attention: {message}"):
        emulated(torch.empty(1, 16, 1, 64, dtype=q.dtype), q, k, v, ranges, 0.125, device=device)


# Each line is what keeps some hazard away; without it some order of threads must give another result.
NEEDED = {
    "a tile of keys is waited for": "cp_async_wait<0>();",
    "and by all threads": "__syncthreads();  // this tile",
    "items share memory": "__syncthreads();  // the item before",
    "a row passes between the lanes of a warp": "__syncwarp();",
}


@pytest.mark.parametrize("line", NEEDED.values(), ids=NEEDED.keys())
def test_the_emulator_sees_a_missing_barrier(emulated, line: str, tmp_path: Path):
    source = next(path for path in SOURCES if path.parent.name == "sm80")
    text = source.read_text()
    assert text.count(line) == 1
    (tmp_path / "sm80").mkdir()
    broken = tmp_path / "sm80" / source.name
    broken.write_text(text.replace(line, "//"))
    changed = compile_for_host(broken, tmp_path)
    objects = [changed if path.name == changed.name else path for path in emulated.objects]
    assert changed in objects
    case = Case(queries=160, ranges=one((0, 260)), heads=2)
    arguments = case.arguments(torch.bfloat16, 64)
    wanted = run(emulated, arguments, "sm_80", ctas=1)
    careless = EmulatedAttention(tmp_path, objects)
    assert any(not torch.equal(run(careless, arguments, "sm_80", ctas=1, seed=seed), wanted) for seed in (1, 2, 3))
