"""kv_update_ against plain PyTorch; float64 is the oracle."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.model.rope import RotaryTables
from cfpp_rt.ops import backends
from cfpp_rt.ops.kv_update import kv_update_
from cfpp_rt.reference.kv_update import kv_update_ as reference
from tests.closeness import assert_no_worse_than

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclasses.dataclass(frozen=True)
class Case:
    frames: int = 1
    rows: int = 1
    columns: int = 1
    batch: int = 1
    heads: int = 3
    head_dim: int = 16
    groups: int = 1
    start: int = 0  # absolute latent frame
    packed: bool = True  # q, k, v are views of one projection

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def capacity(self) -> int:
        return 3 * self.tokens + 5

    def arguments(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Tensors of one call; the caches are strided views of larger buffers that are NaN everywhere."""
        generator = torch.Generator().manual_seed(7)
        width = self.heads * self.head_dim
        buffers = torch.full((2, self.batch, self.heads + 1, self.capacity + 2, self.head_dim), float("nan")).to(dtype)
        caches = buffers.to(device)[:, :, 1:, 1:-1]
        packed = torch.randn(self.batch, self.tokens, 3 * width, generator=generator).to(dtype).to(device)
        qkv = packed.chunk(3, dim=-1)
        if not self.packed:
            qkv = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in qkv)
        norms = (torch.rand(2, width, generator=generator) + 0.5).to(dtype).to(device)
        tables = RotaryTables.build(self.head_dim, self.rows, self.columns, device)
        time = [tables.time(range(self.start + b, self.start + b + self.frames)) for b in range(self.batch)]
        part = self.tokens // self.groups
        first = [[(g + 1) * (part + 1) + b for g in range(self.groups)] for b in range(self.batch)]
        write_index = torch.tensor(first, dtype=torch.int32, device=device)
        return [*caches, *qkv, *norms, torch.stack(time), tables.rows, tables.columns, write_index]


CASES = {
    "1 token": Case(),
    "127 tokens": Case(columns=127),
    "128 tokens": Case(rows=2, columns=64),
    "129 tokens": Case(rows=3, columns=43),
    "1560 tokens of the 1.3B model": Case(rows=30, columns=52, heads=12, head_dim=128),
    "two groups, two frames": Case(frames=2, rows=3, columns=5, groups=2),
    "batch of 2": Case(frames=2, rows=3, columns=5, groups=2, batch=2),
    "token stride is not the row": Case(rows=3, columns=5, batch=2, packed=False),
    "beyond 1024 frames": Case(frames=3, rows=2, columns=2, start=5000),
    "head size with a tail": Case(rows=2, columns=3, head_dim=22),
    "smallest head with three axes": Case(rows=2, columns=3, head_dim=6),
    "width of the 14B model": Case(columns=3, heads=40, head_dim=128),
    "wider than a CTA": Case(columns=3, heads=80, head_dim=128),
}


def copied(arguments: list[Tensor]) -> list[Tensor]:
    """The same call on copies of the entire cache buffers; the views keep strides and offset."""
    base = arguments[0]._base.clone()
    caches = [base.as_strided(c.shape, c.stride(), c.storage_offset()) for c in arguments[:2]]
    return [*caches, *arguments[2:]]


def buffer(arguments: list[Tensor]) -> Tensor:
    return arguments[0]._base


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_float64(case: Case, dtype: torch.dtype, device: str):
    ours, plain, untouched = (case.arguments(dtype, device) for _ in range(3))
    wide = [t.double() if t.dtype == dtype else t for t in case.arguments(dtype, device)]
    q_ours, q_plain, q_oracle = kv_update_(*ours, EPS), reference(*plain, EPS), reference(*wide, EPS)
    assert q_ours.shape == (case.batch, case.heads, case.tokens, case.head_dim) and q_ours.is_contiguous()
    assert_no_worse_than(q_ours, q_plain, q_oracle, name="q")
    written = wide[0].isfinite()
    assert_no_worse_than(ours[0][written], plain[0][written], wide[0][written], name="k_cache")
    assert torch.equal(bits(ours[1]), bits(plain[1])), "v must move bit for bit"
    # Everything else of both buffers, rows around the views included, keeps its NaN bits.
    mask = torch.zeros_like(buffer(ours), dtype=torch.bool)
    mask[:, :, 1:, 1:-1] = torch.stack([plain[0].isfinite(), plain[1].isfinite()])
    assert int(mask.sum()) == 2 * q_ours.numel()
    assert torch.equal(bits(buffer(ours))[~mask], bits(buffer(untouched))[~mask])


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_are_bit_equal(device: str):
    first = CASES["1560 tokens of the 1.3B model"].arguments(torch.bfloat16, device)
    second = copied(first)
    assert torch.equal(kv_update_(*first, EPS), kv_update_(*second, EPS))
    assert torch.equal(bits(buffer(first)), bits(buffer(second)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_matches_pytorch_for_every_kind_of_value(dtype: torch.dtype):
    """Weights are chosen so that results include subnormal, normal, overflowing and non-finite values."""
    arguments = Case(head_dim=128, heads=2).arguments(dtype, "cpu")
    scale = torch.logspace(-12, 6, arguments[5].numel(), dtype=torch.float64)
    arguments[5] = scale.clamp(max=torch.finfo(dtype).max).to(dtype)
    arguments[2] = torch.full_like(arguments[2], 1.5)
    arguments[7][..., 0], arguments[7][..., 1] = 1.0, 0.0  # no turn by time: the weight itself comes out
    ours = kv_update_(*arguments, 0.0)
    wanted = reference(*arguments, 0.0)
    assert torch.equal(ours.isinf(), wanted.isinf())
    close = torch.isclose(ours.double(), wanted.double(), rtol=2 * torch.finfo(dtype).eps, atol=2**-24)
    assert bool((close | wanted.isinf()).all())
    arguments[2] = torch.full_like(arguments[2], float("nan"))
    assert bool(kv_update_(*arguments, EPS).isnan().all())


def test_float64_runs_the_reference():
    arguments = [t.double() if t.is_floating_point() else t for t in Case(columns=4).arguments(torch.float32, "cpu")]
    arguments[7:10] = [t.float() for t in arguments[7:10]]
    twin = [arguments[0].clone(), arguments[1].clone(), *arguments[2:]]
    assert torch.equal(kv_update_(*arguments, EPS), reference(*twin, EPS))


NAMES = ["k_cache", "v_cache", "q", "k", "v", "q_norm", "k_norm", "rope_t", "rope_h", "rope_w", "write_index"]
BAD = {
    "q of another length": ("q", lambda t: t[:, :-1], r"q must be \[B=2, S=12, H\*D=48\], got \[2, 11, 48\]"),
    "k of another width": ("k", lambda t: t[..., :-2], r"k must be .*got \[2, 12, 46\]"),
    "v with strided channels": ("v", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "v must be contiguous"),
    "k of another dtype": ("k", lambda t: t.half(), "k must be torch.float32( like q)?, got torch.float16"),
    "cache of another dtype": ("k_cache", lambda t: t.double(), "k_cache must be torch.float32"),
    "cache without heads": ("k_cache", lambda t: t[:, 0], r"k_cache(, q)? must be \[B, H, capacity, even D\]"),
    "caches of two sizes": ("v_cache", lambda t: t[:, :, 1:], "v_cache must be"),
    "norm of another length": ("q_norm", lambda t: t[1:], r"q_norm must be \[H\*D=48\], got \[47\]"),
    "too few pairs": ("rope_t", lambda t: t[:, :, 1:], "rope_t, rope_h, rope_w must be"),
    "table in float64": ("rope_h", lambda t: t.double(), "rope_h must be torch.float32, got torch.float64"),
    "index in int64": ("write_index", lambda t: t.long(), "write_index must be torch.int32, got torch.int64"),
    "groups do not divide": ("write_index", lambda t: t.repeat(1, 5)[:, :5], r"write_index must be \[B=2, G\]"),
    "no groups": ("write_index", lambda t: t[:, :0], r"write_index must be \[B=2, G\]"),
    "no tokens": ("rope_h", lambda t: t[:0], "S = F .* must be at least 1, got 0"),
    "index past the end": ("write_index", lambda t: t + 100, r"write_index.*must be in 0\.\.35.*got.* 10\d"),
    "negative index": ("write_index", lambda t: t - 100, r"write_index.*must be in 0\.\.35.*got.*-\d"),
}


@pytest.mark.parametrize(("name", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named_and_nothing_is_written(name, change, message):
    arguments = Case(frames=2, rows=2, columns=3, groups=2, batch=2).arguments(torch.float32, "cpu")
    before = buffer(arguments).clone()
    wrong = list(arguments)
    wrong[NAMES.index(name)] = change(arguments[NAMES.index(name)])
    with pytest.raises(InputError, match=f"kv_update_: {message}"):
        kv_update_(*wrong, EPS)
    assert torch.equal(bits(buffer(arguments)), bits(before))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str):
    arguments = Case(frames=2, rows=2, columns=3, groups=2).arguments(torch.float32, device)
    arguments[:2] = [t.contiguous().nan_to_num() for t in arguments[:2]]
    torch.library.opcheck(torch.ops.cfpp_rt.kv_update_.default, (*arguments, EPS, None, None))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str):
    eager = Case(frames=2, rows=2, columns=3, groups=2).arguments(torch.float32, "cpu")
    compiled = copied(eager)
    call = torch.compile(lambda *tensors: kv_update_(*tensors, EPS) * 2, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(call(*compiled), kv_update_(*eager, EPS) * 2)
    assert torch.equal(bits(buffer(compiled)), bits(buffer(eager)))


def test_an_unknown_backend_is_refused():
    code = "from cfpp_rt.ops import backends; backends()"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CFPP_BACKEND": "gpu"}, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "CFPP_BACKEND must be one of auto, reference, cpu, cuda, kernel, sdpa, cudnn, flash, got 'gpu'" in run.stderr


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


CALL = (
    "import torch; from tests.ops.test_kv_update import Case, EPS, kv_update_\n"
    "def call(): return kv_update_(*Case(columns=3).arguments(torch.float32, 'cpu'), EPS).isfinite().all().item()\n"
)


@pytest.mark.skipif(os.environ.get("CFPP_BACKEND", "auto") != "auto", reason="a backend is forced")
def test_the_kernel_runs_and_not_the_reference():
    """Otherwise every comparison above would compare the reference with itself."""
    assert backends()["kv_update_"]["cpu"][0] == "cpu", backends()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_backend_can_be_forced(backend: str):
    code = CALL + "from cfpp_rt.ops import backends; print(backends()['kv_update_']['cpu'][0], call())"
    run = run_python(code, CFPP_BACKEND=backend)
    assert run.stdout.strip() == f"{backend} True", run.stderr


def test_a_missing_kernel_warns_once():
    run = run_python("import sys; sys.modules['cfpp_rt._C'] = None\n" + CALL + "call(); call(); print(call())")
    assert run.stdout.strip() == "True" and run.stderr.count("run in plain PyTorch") == 1, run.stderr
    run = run_python("import sys; sys.modules['cfpp_rt._C'] = None\n" + CALL + "call()", CFPP_BACKEND="cpu")
    assert "CFPP_BACKEND=cpu cannot be met" in run.stderr


def test_gradients_are_refused():
    arguments = Case(columns=3).arguments(torch.float32, "cpu")
    arguments[2] = arguments[2].clone().requires_grad_()
    with pytest.raises(InputError, match="has no gradient"):
        kv_update_(*arguments, EPS)
    with torch.no_grad():
        kv_update_(*arguments, EPS)
