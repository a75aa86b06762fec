"""Conversion of published LMDB sets, prompts and ODE trajectories to folders of shards."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpp_rt.distill.causal_cd import Guidance
from cfpp_rt.distill.causal_ode import STORED_ENTRIES, solve
from cfpp_rt.distill.data.data_source import condition_of
from cfpp_rt.distill.data.shards import Column, ShardFolder, ShardWriter
from cfpp_rt.distill.forward import Denoiser
from cfpp_rt.errors import CheckpointError, InputError, MissingExtraError

Encode = Callable[[Sequence[str]], Tensor]  # from prompts to embeddings [B, text_len, text_dim]
_BATCH = 8  # prompts that are encoded in one call


class LmdbClips:
    """An LMDB in the layout that Causal Forcing published.

    Entry `latents_shape` is the text "N ... h w"; row i has the entries `latents_{i}_data`, raw float16, and
    `prompts_{i}_data`, UTF-8. A row is a clip [F, C, h, w], or the states [K, F, C, h, w] of an ODE solution from noisy
    to clean. CheckpointError names path and entry of what is missing or has another size.
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
        """Return the latents of a row, float16 in `shape`, and its prompt."""
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
    progress: Callable[[int], object] = lambda rows: None,
) -> int:
    """Write the clips of an LMDB as shards, float16 as they are; return the number of rows.

    encode: from prompts to embeddings; None = no embeddings.
    trajectories: store all states but the last, the clean clip, as `trajectory`; the last of these is the ODE's end
        point. The source's rows must be [K, F, C, h, w].
    progress: called with the number of rows that have been added.
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
    progress: Callable[[int], object] = lambda rows: None,
) -> int:
    """Write the embeddings of prompts, which stage dmd needs; return their number. progress: as `convert_lmdb`."""
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
    stored: Sequence[int] = STORED_ENTRIES,
    seed: int = 0,
    batch: int = 1,
    max_rows: int | None = None,
    rows_per_shard: int = 16,
    resume: bool = False,
    progress: Callable[[int], object] = lambda rows: None,
) -> int:
    """Write the clips of a folder with their ODE trajectories, which stage ode needs; return the number of rows.

    Trajectories are stored in float16, as published.
    teacher: the model of stage ar.
    timesteps, guidance, stored: see `causal_ode.solve`.
    seed: the noise of row i has the key (seed, i).
    batch: number of rows that are solved together.
    max_rows: number of rows to take from the start of the folder; None = all.
    progress: as `convert_lmdb`.
    """
    if "latents" not in source.columns:
        raise InputError(f"{source.folder}: must have latents, got {', '.join(source.columns)}")
    clip = source.columns["latents"].shape
    columns = {**source.columns, "trajectory": Column("float16", (len(stored) + 1, *clip))}
    device = teacher.network.device
    total = len(source) if max_rows is None else min(max_rows, len(source))
    with ShardWriter(folder, columns, rows_per_shard=rows_per_shard, resume=resume) as writer:
        progress(writer.written)
        for begin in range(writer.written, total, batch):
            numbers = range(begin, min(begin + batch, total))
            rows = [source.row(number) for number in numbers]
            noise = np.stack([_row_noise(seed, number, clip) for number in numbers])
            stacked = {name: torch.stack([row[name] for row in rows]) for name in source.columns}
            condition = condition_of(stacked, len(rows)).to(device)
            clean, start = stacked["latents"].float().to(device), torch.from_numpy(noise).to(device)
            solutions = solve(teacher, clean, start, condition, timesteps, guidance, stored)
            for number, row, states in zip(numbers, rows, solutions.cpu(), strict=True):
                writer.add({**row, "trajectory": states}, source.text(number))
            progress(len(numbers))
    return total


def _row_noise(seed: int, number: int, clip: tuple[int, ...]) -> NDArray[np.float32]:
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))
    return rng.standard_normal(clip, dtype=np.float32)


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a UTF-8 file with one prompt per line; blank lines are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines also splits at form feeds and U+2028
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
    progress: Callable[[int], object],
) -> int:
    """Write the rows that are not written yet, with their texts encoded a few at a time; return `total`."""
    if encode is not None:
        columns = {**columns, "embeds": Column.of(encode(["a"])[0], trimmed=True)}
    with ShardWriter(folder, columns, rows_per_shard=rows_per_shard, resume=resume) as writer:
        progress(writer.written)
        remaining = rows(writer.written)
        while chunk := list(itertools.islice(remaining, _BATCH)):
            prompt_embeds: Any = [None] * len(chunk) if encode is None else encode([text for _, text in chunk])
            for (row, text), embed in zip(chunk, prompt_embeds, strict=True):
                writer.add(row if embed is None else {**row, "embeds": embed}, text)
            progress(len(chunk))
    return total
