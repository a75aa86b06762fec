"""The protocol of the Hopper attention kernel, executed on the host: TMA and wgmma finish whenever it hurts, in orders
drawn from seeds. What the kernels of all architectures have in common is in test_attention_emulated.py."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.reference.block_attention import block_attention as reference
from tests.closeness import assert_no_worse_than
from tests.emulator.attention import ROOT, SOURCES, EmulatedAttention, compile_for_host
from tests.ops.test_attention_emulated import Case, one, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no host compiler")

KERNEL = ROOT / "csrc/block_attention/sm90/kernel.cu"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> EmulatedAttention:
    folder = tmp_path_factory.mktemp("emulated")
    return EmulatedAttention(folder, [compile_for_host(source, folder) for source in SOURCES])


def check(emulated: EmulatedAttention, case: Case, dtype: torch.dtype, head_dim: int, seed: int) -> Tensor:
    arguments = case.arguments(dtype, head_dim)
    scale = head_dim**-0.5
    ours = run(emulated, arguments, "sm_90", ctas=case.ctas, splits=case.splits, seed=seed)
    oracle = reference(*(t.double() for t in arguments[:3]), arguments[3], scale)
    floor = torch.finfo(dtype).eps * float(oracle.abs().max()) / 2
    assert_no_worse_than(ours, reference(*arguments, scale), oracle, floor=floor)
    return ours


TILE_EDGES = {
    **{
        f"range of {n}": Case(queries=65, ranges=one((7, 7 + n))) for n in (1, 15, 16, 17, 175, 176, 177, 352, 353, 400)
    },
    "300 queries": Case(queries=300, ranges=one((0, 360))),
    # Two, three, five tiles: the stages of head_dim 128 come round once and twice.
    "five tiles": Case(queries=10, ranges=one((0, 880))),
    "short ranges between long ones": Case(
        queries=70, ranges=one((3, 30), (50, 300), (310, 311), (400, 800), (900, 980))
    ),
    "two groups, batch of two": Case(
        queries=2 * 129,
        ranges=((((0, 400), (0, 0)), ((20, 50), (100, 600))), (((5, 6), (200, 380)), ((0, 176), (0, 0)))),
        heads=2,
        ctas=3,
        splits=2,
    ),
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", TILE_EDGES.values(), ids=TILE_EDGES.keys())
def test_tile_edges(emulated, case: Case, head_dim: int):
    dtype = torch.bfloat16 if case.queries != 65 or head_dim == 128 else torch.float16
    check(emulated, case, dtype, head_dim, seed=1)


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize("ctas", [1, 2, 3])
def test_items_follow_each_other_in_any_interleaving(emulated, ctas: int, splits: int):
    """Barriers run on from item to item; pieces may have no tiles; all orders give the same bits."""
    ranges = ((((0, 250), (260, 270), (300, 700)), ((30, 50), (0, 0), (0, 0))),)
    for head_dim in (64, 128):
        case = Case(queries=2 * 70, ranges=ranges, heads=2, ctas=ctas, splits=splits)
        first, *others = (check(emulated, case, torch.bfloat16, head_dim, seed) for seed in (1, 2, 3))
        assert all(torch.equal(first, other) for other in others)


# What keeps a hazard away, and what stands there instead: under some order the result must change or the kernel stop.
HAZARDS = {
    "wgmma sees cleared rows only behind a proxy fence": ("    async_proxy_fence();\n", ""),
    "all rows are cleared before anyone multiplies": (
        "    named_barrier_sync<kConsumerBarrier, kConsumers * kWarpgroup>();\n",
        "",
    ),
    "V has landed": (
        "start_logits(logits);\n      barrier_wait(shared_.v_full[v_.stage], v_.parity);",
        "start_logits(logits);",
    ),
    "V is overwritten when both have used it": ("barrier_wait(shared.v_empty[v.stage], v.parity ^ 1);", ""),
    "wgmma has read the probabilities": (
        "      finish_out(out, probabilities);\n      if",
        "      pack(logits, probabilities);\n      finish_out(out, probabilities);\n      if",
    ),
    "Q stays until the last logits": ("release_k(i == keys.tiles - 1)", "release_k(i == 1)"),
    "both roles skip an empty piece": ("tile <= keys.tiles && keys.tiles > 0", "tile <= keys.tiles"),
}


def with_change(emulated: EmulatedAttention, folder: Path, line: str, instead: str) -> EmulatedAttention:
    """The kernels, with another line in a role of the Hopper kernel."""
    text = KERNEL.read_text()
    headers = {role: KERNEL.with_name(role).read_text() for role in ("consumer.cuh", "producer.cuh")}
    assert sum(header.count(line) for header in headers.values()) == 1
    for role, header in headers.items():
        changed = header.replace("#pragma once", "").replace(line, instead)
        text = text.replace(f'#include "block_attention/sm90/{role}"', changed)
    source = folder / "sm90" / KERNEL.name
    source.parent.mkdir()
    source.write_text(text)
    kernel = compile_for_host(source, folder)
    assert kernel.name in [path.name for path in emulated.objects]
    return EmulatedAttention(folder, [kernel if path.name == kernel.name else path for path in emulated.objects])


@pytest.mark.parametrize(("line", "instead"), HAZARDS.values(), ids=HAZARDS.keys())
def test_the_emulator_sees_the_hazard(emulated, line: str, instead: str, tmp_path: Path):
    careless = with_change(emulated, tmp_path, line, instead)
    arguments = Case(queries=70, ranges=one((3, 30), (50, 80), (90, 800)), heads=2).arguments(torch.bfloat16, 128)

    def is_seen(plan: dict) -> bool:
        wanted = run(emulated, arguments, "sm_90", **plan)
        try:
            return any(not torch.equal(run(careless, arguments, "sm_90", seed=n, **plan), wanted) for n in range(1, 7))
        except InputError:
            return True

    # Seven tiles of keys: whole, one item after the other, and in eight pieces.
    assert any(is_seen(plan) for plan in ({"ctas": 1}, {"ctas": 3, "splits": 8}))


def growing(head_dim: int) -> list[Tensor]:
    """Arguments whose logits grow from one tile of keys to the next, first by little, then by much."""
    arguments = Case(queries=70, ranges=one((0, 900))).arguments(torch.bfloat16, head_dim)
    arguments[1] *= torch.linspace(0.3, 4, arguments[1].shape[2])[:, None] ** 2
    return arguments


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_maximum_that_lags_behind(emulated, head_dim: int, tmp_path: Path):
    arguments, scale = growing(head_dim), head_dim**-0.5
    oracle = reference(*(t.double() for t in arguments[:3]), arguments[3], scale)
    plain = reference(*arguments, scale)
    assert_no_worse_than(run(emulated, arguments, "sm_90", ctas=1, seed=1), plain, oracle)
    stale = with_change(emulated, tmp_path, "      if (grew) {", "      if (false) {")
    with pytest.raises(AssertionError):
        assert_no_worse_than(run(stale, arguments, "sm_90", ctas=1, seed=1), plain, oracle)


def test_a_deadlock_names_role_barrier_and_phase(emulated, tmp_path: Path):
    silent = with_change(emulated, tmp_path, "    release(shared_.v_empty[v_.stage]);\n", "")
    arguments = Case(queries=10, ranges=one((0, 700))).arguments(torch.bfloat16, 128)
    with pytest.raises(InputError, match=r"1 at warpgroup 0: v_empty\[stage\] #0 phase 0"):
        run(silent, arguments, "sm_90", ctas=1, seed=1)
