"""What is written into folders of shards: published LMDB sets, prompts, and ODE trajectories."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpp_rt.distill.causal_cd import Guidance
from cfpp_rt.distill.causal_ode import KEPT, solve
from cfpp_rt.distill.data.feed import condition_of
from cfpp_rt.distill.data.shards import Column, ShardFolder, ShardWriter
from cfpp_rt.distill.forward import Denoiser
from cfpp_rt.errors import CheckpointError, InputError, MissingExtraError

Encode = Callable[[Sequence[str]], Tensor]  # prompts to embeddings [B, text_len, text_dim]
_BATCH = 8  # prompts that are encoded together


class LmdbClips:
    """The published layout: `latents_shape` "N ... h w", then per row raw float16 `latents_{i}_data` and UTF-8
    `prompts_{i}_data`. A row is a clip [F, C, h, w], or [K, F, C, h, w] states from noisy to clean.

    Raises CheckpointError naming path and entry for what is missing or of another size.
    """

    def __init__(self, path: str | Path):
        try:
            import lmdb
        except ImportError as error:
            raise MissingExtraError("lmdb", "lmdb", "reading an LMDB") from error
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        try:
            self._entries = lmdb.open(
                str(path), subdir=self.path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
            )
        except lmdb.Error as error:
            raise CheckpointError(f"{path}: not an LMDB ({error})") from error
        try:
            rows, *shape = map(int, self._entry("latents_shape").split())
        except ValueError as error:
            raise CheckpointError(f"{path}: latents_shape must be integers with spaces between ({error})") from error
        if len(shape) not in (4, 5):
            raise CheckpointError(f"{path}: a row must be [F, C, h, w] or [K, F, C, h, w], got {shape}")
        self.rows, self.shape = rows, tuple(shape)

    def __len__(self) -> int:
        return self.rows

    def row(self, number: int) -> tuple[Tensor, str]:
        """Latents float16 of `shape`, and the prompt."""
        name = f"latents_{number}_data"
        data = self._entry(name)
        if len(data) != 2 * int(np.prod(self.shape)):
            raise CheckpointError(
                f"{self.path}: {name} must have {2 * int(np.prod(self.shape))} bytes, got {len(data)}"
            )
        latents = torch.from_numpy(np.frombuffer(data, dtype=np.float16).reshape(self.shape).copy())
        try:
            return latents, self._entry(f"prompts_{number}_data").decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: prompts_{number}_data is not UTF-8") from error

    def _entry(self, name: str) -> bytes:
        with self._entries.begin() as transaction:
            data = transaction.get(name.encode())
        if data is None:
            raise CheckpointError(f"{self.path}: has no entry {name}")
        return data


def convert_lmdb(
    source: LmdbClips,
    folder: str | Path,
    encode: Encode | None,
    *,
    trajectories: bool = False,
    rows_per_shard: int = 64,
    resume: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Write an LMDB's clips as shards, float16 as they are; returns the number of rows.

    encode: of the prompts; None = no embeddings. trajectories: keep the states before the clean clip as `trajectory`
    (the ODE's end point is their last); the source's rows must be [K, F, C, h, w] then.
    """
    states = source.shape[0] if len(source.shape) == 5 else 0
    if trajectories and states < 3:
        raise InputError(f"{source.path}: rows must be [K >= 3, F, C, h, w] for trajectories, got {list(source.shape)}")
    columns = {"latents": Column("float16", source.shape[-4:])}
    if trajectories:
        columns["trajectory"] = Column("float16", (states - 1, *source.shape[-4:]))

    def rows(first: int) -> Iterator[tuple[dict[str, Tensor], str]]:
        for number in range(first, len(source)):
            latents, prompt = source.row(number)
            row = {"latents": latents[-1] if states else latents}
            if trajectories:
                row["trajectory"] = latents[:-1]
            yield row, prompt

    return _write(folder, columns, rows, len(source), encode, rows_per_shard, resume, progress)


def encode_prompts(
    prompts: Sequence[str],
    folder: str | Path,
    encode: Encode,
    *,
    rows_per_shard: int = 1024,
    resume: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Write the embeddings of prompts, what stage dmd needs of text; returns their number."""
    if not prompts:
        raise InputError("prompts must be at least one, got none")
    return _write(
        folder,
        {},
        lambda first: (({}, prompt) for prompt in prompts[first:]),
        len(prompts),
        encode,
        rows_per_shard,
        resume,
        progress,
    )


def solve_trajectories(
    teacher: Denoiser,
    source: ShardFolder,
    folder: str | Path,
    timesteps: Tensor,
    *,
    guidance: Guidance | None = None,
    kept: Sequence[int] = KEPT,
    seed: int = 0,
    batch: int = 1,
    most: int | None = None,
    rows_per_shard: int = 16,
    resume: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Write the clips of a folder together with their ODE trajectories, what stage ode needs; returns the rows.

    teacher: of stage ar. timesteps: float32, as `causal_ode.solve`. seed: the noise of row i is that of (seed, i).
    batch: rows that are solved together. most: the first rows only. Trajectories are kept in float16, as published.
    """
    if "latents" not in source.columns:
        raise InputError(f"{source.folder}: must have latents, got {', '.join(source.columns)}")
    clip = source.columns["latents"].shape
    columns = {**source.columns, "trajectory": Column("float16", (len(kept) + 1, *clip))}
    device = teacher.network.device
    total = len(source) if most is None else min(most, len(source))
    with ShardWriter(folder, columns, rows_per_shard=rows_per_shard, resume=resume) as writer:
        for begin in range(writer.written, total, batch):
            numbers = range(begin, min(begin + batch, total))
            rows = [source.row(number) for number in numbers]
            noise = np.stack([_row_noise(seed, number, clip) for number in numbers])
            whole = {name: torch.stack([row[name] for row in rows]) for name in source.columns}
            condition = condition_of(whole, len(rows)).to(device)
            clean, start = whole["latents"].float().to(device), torch.from_numpy(noise).to(device)
            found = solve(teacher, clean, start, condition, timesteps, guidance, kept)
            for number, row, states in zip(numbers, rows, found.cpu(), strict=True):
                writer.add({**row, "trajectory": states}, source.text(number))
            progress(numbers[-1] + 1, total)
    return total


def _row_noise(seed: int, number: int, clip: tuple[int, ...]) -> NDArray[np.float32]:
    draws = np.random.Generator(np.random.Philox(key=[seed, number]))
    return draws.standard_normal(clip, dtype=np.float32)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line; blank lines are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8, byte {error.start} is not") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"{path}: wanted one prompt per line, found none")
    return prompts


def _write(
    folder: str | Path,
    columns: dict[str, Column],
    rows: Callable[[int], Iterator[tuple[dict[str, Tensor], str]]],
    total: int,
    encode: Encode | None,
    rows_per_shard: int,
    resume: bool,
    progress: Callable[[int, int], object],
) -> int:
    """Rows from the first that is not written yet, their texts encoded a few at a time."""
    if encode is not None:
        columns = {**columns, "embeds": Column.of(encode(["a"])[0], trimmed=True)}
    with ShardWriter(folder, columns, rows_per_shard=rows_per_shard, resume=resume) as writer:
        done, left = writer.written, rows(writer.written)
        while chunk := [row for _, row in zip(range(_BATCH), left, strict=False)]:
            embeds: Any = [None] * len(chunk) if encode is None else encode([text for _, text in chunk])
            for (row, text), embed in zip(chunk, embeds, strict=True):
                writer.add(row if embed is None else {**row, "embeds": embed}, text)
            done += len(chunk)
            progress(done, total)
    return total


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal that is told (done, total); nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="row", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
