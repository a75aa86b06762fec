"""Stored data: what is written comes back bit by bit, batches are functions of their number, faults are named."""

import errno
import json
import os
import sys

import numpy as np
import pytest
import torch

from cfpp_rt.cli.main import main
from cfpp_rt.core.camera import INTRINSICS, parse_trajectory
from cfpp_rt.distill.causal_cd import Guidance, timestep_table
from cfpp_rt.distill.causal_ode import solve
from cfpp_rt.distill.data import make
from cfpp_rt.distill.data.data_source import open_data_source
from cfpp_rt.distill.data.shards import Column, ShardFolder, ShardWriter
from cfpp_rt.distill.forward import Condition, Denoiser, Layout
from cfpp_rt.errors import CheckpointError, InputError, MissingExtraError
from tests.distill.tiny import tiny_model

CLIP = (3, 16, 4, 4)


def clip(number):
    return torch.randn(CLIP, generator=torch.Generator().manual_seed(number)).half()


def embed(prompts):
    """Embeddings of 5 rows, of which as many are not zero as a prompt has letters, 5 at most."""
    found = torch.zeros(len(prompts), 5, 8, dtype=torch.bfloat16)
    for row, prompt in zip(found, prompts, strict=True):
        for place, letter in enumerate(prompt[:5]):
            row[place] = ord(letter) / 64
    return found


@pytest.fixture
def folder(tmp_path):
    columns = {"latents": Column("float16", CLIP), "embeds": Column("bfloat16", (5, 8), trimmed=True)}
    with ShardWriter(tmp_path / "clips", columns, rows_per_shard=4) as writer:
        for number in range(10):
            text = "abcdefghij"[: number % 6]
            writer.add({"latents": clip(number), "embeds": embed([text])[0]}, text)
    return tmp_path / "clips"


def test_every_row_comes_back_bit_by_bit(folder):
    shards = ShardFolder(folder)
    assert len(shards) == 10 and [shard["rows"] for shard in shards._shards] == [4, 4, 2]
    for number in (9, 0, 4, 3, 8):
        row = shards.row(number)
        assert torch.equal(row["latents"], clip(number)) and row["latents"].dtype == torch.float16
        assert torch.equal(row["embeds"], embed([shards.text(number)])[0])
    assert list(shards.check()) == []
    with pytest.raises(InputError, match="row must be in 0..9, got 10"):
        shards.row(10)


def rows_of(batch):
    return [next(n for n in range(10) if torch.equal(row, clip(n).float())) for row in batch.latents]


def test_batches_are_functions_of_their_number_and_cover_an_epoch_once(folder):
    data_source = open_data_source(batch=2, folder=str(folder), seed=3)
    epochs = [[row for n in range(5 * e, 5 * e + 5) for row in rows_of(data_source(n))] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    again = open_data_source(batch=2, folder=str(folder), seed=3)
    assert rows_of(again(11)) == epochs[2][2:4]  # without the batches before it
    assert [r for n in range(5) for r in rows_of(open_data_source(batch=2, folder=str(folder), seed=4)(n))] != epochs[0]


@pytest.mark.parametrize("world", [2, 5])
def test_the_ranks_batches_are_the_parts_of_one_large_batch(folder, world):
    large, small = open_data_source(batch=2 * world, folder=str(folder)), open_data_source(batch=2, folder=str(folder))
    for step in range(4):
        parts = [rows_of(small(step * world + rank)) for rank in range(world)]
        assert sum(parts, []) == rows_of(large(step))


def test_frames_and_conditions_of_a_batch(folder):
    batch = open_data_source(batch=3, folder=str(folder), frames=2)(0)
    assert batch.latents.shape == (3, 2, 16, 4, 4) and batch.condition.prompt_embeds.shape == (3, 5, 8)
    assert batch.trajectory is None and batch.condition.actions is None
    with pytest.raises(InputError, match="data.frames must be <= 3, the frames of latents, got 4"):
        open_data_source(batch=1, folder=str(folder), frames=4)(0)


@pytest.mark.parametrize("fault", ["truncated", "garbage", "missing"])
def test_a_broken_shard_is_named_and_harms_no_other(folder, fault):
    path, size = folder / "00001.safetensors", (folder / "00001.safetensors").stat().st_size
    if fault == "garbage":
        path.write_bytes(b"\xff" * size)
        shards = ShardFolder(folder)
        for number in (0, 3, 8):
            shards.row(number)
        with pytest.raises(CheckpointError, match="00001.safetensors: the shard is corrupt"):
            shards.row(4)
        assert [found.name for found, _ in shards.check()] == [path.name]
        return
    path.unlink() if fault == "missing" else os.truncate(path, size - 7)
    message = "cannot be read" if fault == "missing" else f"must have {size} bytes, got {size - 7}"
    with pytest.raises(CheckpointError, match=f"00001.safetensors: the shard {message}"):
        ShardFolder(folder)


def test_a_changed_byte_is_found_by_check(folder, capsys):
    path = folder / "00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["distill-data", "check", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "00002.safetensors: its bytes have changed" in err and "00001" not in err


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"columns": {"latents": {"dtype": "int4", "shape": [1]}}}, {"shards": [{"file": "../x"}]}],
    ids=["format", "dtype", "path"],
)
def test_a_foreign_index_is_refused(folder, change):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(CheckpointError, match="index.json: not an index"):
        ShardFolder(folder)
    (folder / "index.json").unlink()
    with pytest.raises(CheckpointError, match="wanted a folder of shards"):
        ShardFolder(folder)


def test_an_interrupted_writer_is_refused_and_goes_on(tmp_path):
    columns = {"latents": Column("float16", CLIP)}
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "d", columns, rows_per_shard=2) as writer:
        for number in range(5):
            writer.add({"latents": clip(number)})
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="only half-written, 4 rows so far"):
        ShardFolder(tmp_path / "d")
    with pytest.raises(InputError, match="contains data already"):
        ShardWriter(tmp_path / "d", columns)
    with pytest.raises(InputError, match="columns must be"):
        ShardWriter(tmp_path / "d", {"latents": Column("float32", CLIP)}, resume=True)
    with ShardWriter(tmp_path / "d", columns, rows_per_shard=2, resume=True) as writer:
        assert writer.written == 4
        for number in range(4, 7):
            writer.add({"latents": clip(number)})
    shards = ShardFolder(tmp_path / "d")
    assert all(torch.equal(shards.row(number)["latents"], clip(number)) for number in range(7))


def test_a_full_disk_leaves_the_shards_before_it(tmp_path, monkeypatch):
    import safetensors.torch

    writer = ShardWriter(tmp_path / "d", {"latents": Column("float16", CLIP)}, rows_per_shard=1)
    writer.add({"latents": clip(0)})
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    with pytest.raises(InputError, match="00001.safetensors: the shard cannot be written .*No space left"):
        writer.add({"latents": clip(1)})
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["00000.safetensors", "index.json"]
    assert ShardWriter(tmp_path / "d", writer.columns, resume=True).written == 1


def test_rows_that_do_not_fit_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "d", {"latents": Column("float16", CLIP)})
    with pytest.raises(InputError, match="a row must have latents"):
        writer.add({"embeds": clip(0)})
    with pytest.raises(InputError, match=r"latents must be \[3, 16, 4, 4\], got \[2, 16, 4, 4\]"):
        writer.add({"latents": clip(0)[:2]})
    with pytest.raises(InputError, match="no rows were written"):
        writer.close()


def published(path, rows, shape, *, leave_out=None, cut=0):
    lmdb = pytest.importorskip("lmdb")
    states = [np.random.default_rng(n).standard_normal(shape).astype(np.float16) for n in range(rows)]
    with lmdb.open(str(path), map_size=2**24) as entries, entries.begin(write=True) as transaction:
        content = {"latents_shape": " ".join(map(str, (rows, *shape))).encode()}
        for n, state in enumerate(states):
            content[f"latents_{n}_data"] = state.tobytes()[: state.nbytes - cut]
            content[f"prompts_{n}_data"] = "äbcdefg"[: n + 1].encode()
        for name, data in content.items():
            if name != leave_out:
                transaction.put(name.encode(), data)
    return [torch.from_numpy(state) for state in states]


def test_the_published_layout_is_converted(tmp_path):
    states = published(tmp_path / "lmdb", 5, CLIP)
    assert make.convert_lmdb(make.LmdbClips(tmp_path / "lmdb"), tmp_path / "out", embed, rows_per_shard=2) == 5
    shards = ShardFolder(tmp_path / "out")
    for n, state in enumerate(states):
        assert torch.equal(shards.row(n)["latents"], state) and shards.text(n) == "äbcdefg"[: n + 1]
        assert torch.equal(shards.row(n)["embeds"], embed([shards.text(n)])[0])


def test_published_trajectories_are_converted_and_feed_stage_ode(tmp_path, capsys):
    states = published(tmp_path / "lmdb", 2, (6, *CLIP))
    out = tmp_path / "out"
    assert main(["distill-data", "lmdb", str(tmp_path / "lmdb"), "--trajectories", "--no-text", "-o", str(out)]) == 0
    batch = open_data_source(batch=2, folder=str(out))(0)
    assert batch.trajectory.shape == (2, 5, *CLIP) and batch.condition.prompt_embeds.shape == (2, 0, 1)
    order = [0 if torch.equal(row, states[0][-1].float()) else 1 for row in batch.latents]
    assert torch.equal(batch.trajectory, torch.stack([states[n][:-1].float() for n in order]))
    assert make.convert_lmdb(make.LmdbClips(tmp_path / "lmdb"), tmp_path / "clips", None) == 2
    assert set(ShardFolder(tmp_path / "clips").columns) == {"latents"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out": "latents_shape"}, "has no entry latents_shape"),
        ({"leave_out": "latents_1_data"}, "has no entry latents_1_data"),
        ({"leave_out": "prompts_0_data"}, "has no entry prompts_0_data"),
        ({"cut": 2}, "latents_0_data must have 1536 bytes, got 1534"),
    ],
    ids=["shape", "latents", "prompt", "cut"],
)
def test_a_broken_lmdb_is_named(tmp_path, options, message):
    published(tmp_path / "lmdb", 2, CLIP, **options)
    with pytest.raises(CheckpointError, match=message):
        make.convert_lmdb(make.LmdbClips(tmp_path / "lmdb"), tmp_path / "out", None)


def test_without_lmdb_the_pip_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cfpp-rt\[lmdb\]'"):
        make.LmdbClips(tmp_path)


def test_prompts_are_encoded_once_and_an_interrupted_run_goes_on(tmp_path):
    prompts = [chr(ord("a") + n) * (1 + n % 5) for n in range(20)]

    def failing(texts):
        if prompts[16] in texts:
            raise RuntimeError("interrupted")
        return embed(texts)

    with pytest.raises(RuntimeError, match="interrupted"):
        make.encode_prompts(prompts, tmp_path / "p", failing, rows_per_shard=4)
    requested = []
    assert make.encode_prompts(
        prompts, tmp_path / "p", lambda t: requested.extend(t) or embed(t), rows_per_shard=4, resume=True
    )
    assert requested[1:] == prompts[16:]  # the first asks for the shape
    shards = ShardFolder(tmp_path / "p")
    assert [shards.text(n) for n in range(20)] == prompts
    assert all(torch.equal(shards.row(n)["embeds"], embed([prompts[n]])[0]) for n in range(20))


def test_trajectories_are_the_solutions_of_the_teachers_ode(folder, tmp_path):
    teacher = Denoiser(tiny_model(seed=1, text_len=5, text_dim=8), Layout())
    timesteps, guidance = timestep_table(4), Guidance(3.0, embed(["neg"]))
    make.solve_trajectories(
        teacher, ShardFolder(folder), tmp_path / "ode", timesteps, guidance=guidance, stored=(0, 2), seed=7
    )
    shards = ShardFolder(tmp_path / "ode")
    assert len(shards) == 10 and set(shards.columns) == {"latents", "embeds", "trajectory"}
    row = shards.row(6)
    noise = np.random.Generator(np.random.Philox(key=[7, 6])).standard_normal((1, *CLIP), dtype=np.float32)
    condition = Condition(row["embeds"][None])
    wanted = solve(teacher, clip(6)[None].float(), torch.from_numpy(noise), condition, timesteps, guidance, (0, 2))
    assert torch.equal(row["trajectory"], wanted[0].half()) and row["trajectory"].shape == (3, *CLIP)
    options = {"guidance": guidance, "stored": (0, 2), "seed": 7, "batch": 4, "max_rows": 7}
    assert make.solve_trajectories(teacher, ShardFolder(folder), tmp_path / "some", timesteps, **options) == 7
    some = ShardFolder(tmp_path / "some")
    for number in range(7):  # products of another shape round otherwise, and float16 rounds once more
        for name, tensor in shards.row(number).items():
            torch.testing.assert_close(some.row(number)[name], tensor, rtol=0, atol=4e-3 if name == "trajectory" else 0)


def test_cameras_are_stored_and_reach_a_batch(tmp_path):
    views = {number: torch.from_numpy(parse_trajectory("w*1,j*1" if number else "l*2")) for number in range(2)}
    lens = torch.diag(torch.tensor([0.5, 0.9, 1.0])).expand(3, 3, 3)
    columns = {"latents": Column("float16", CLIP), "views": Column("float32", (3, 4, 4))}
    for name, more in (("lens", {"intrinsics": lens}), ("no-lens", {})):
        kinds = {**columns, **{key: Column.of(value) for key, value in more.items()}}
        with ShardWriter(tmp_path / name, kinds) as writer:
            for number in range(2):
                writer.add({"latents": clip(number), "views": views[number], **more})
        batch = open_data_source(batch=2, folder=str(tmp_path / name), frames=2)(0)
        order = [0 if torch.equal(row, clip(0)[:2].float()) else 1 for row in batch.latents]
        wanted = torch.stack([views[number][:2] for number in order])
        torch.testing.assert_close(torch.from_numpy(batch.condition.cameras.views), wanted, rtol=0, atol=1e-6)
        focal = torch.tensor([0.5, 0.9] if more else INTRINSICS["training"], dtype=torch.float64)
        np.testing.assert_allclose(batch.condition.cameras.focal, focal.expand(2, 2, 2), rtol=0, atol=1e-6)
