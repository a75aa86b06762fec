"""Folders of shards: rows of named tensors in safetensors files and an index, with random access to rows.

    folder/index.json               columns; rows, bytes and sha256 of the shards; whether the folder is complete
    folder/00000.safetensors ...    every column, stacked over the rows of the shard

A column may be trimmed: each row is stored without the zero rows at its end, and reading restores them. Text embeddings
consist mostly of such rows.
"""

import bisect
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.io.digest import sha256_of

INDEX = "index.json"
_FORMAT = "cfpp-shards-1"
_ENDS = ".ends"  # suffix of the tensor with the ends of the rows of a trimmed column, int64 [rows]
_TEXTS = "texts"
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: one tensor per row.

    dtype: float32, float16, bfloat16 or int64.
    shape: shape of the tensor of one row.
    trimmed: store each tensor without the zero rows at its end.
    """

    dtype: str
    shape: tuple[int, ...]
    trimmed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype not in _DTYPES:
            raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not self.shape and self.trimmed:
            raise InputError("a trimmed column must have rows to trim, got shape []")

    @classmethod
    def of(cls, tensor: Tensor, *, trimmed: bool = False) -> "Column":
        """Return the column whose rows are like this tensor."""
        return cls(str(tensor.dtype)[6:], tuple(tensor.shape), trimmed)


class ShardWriter:
    """A writer of a folder, shard by shard; use it as a context manager.

    Shards are written atomically and entered in the index afterwards. What a crash or a full disk leaves can be
    continued with `resume`; until then `ShardFolder` refuses it.
    rows_per_shard: number of rows of a shard; the last one may have fewer.
    resume: continue an unfinished folder; the caller must add rows from number `written` on.
    """

    def __init__(
        self, folder: str | Path, columns: Mapping[str, Column], *, rows_per_shard: int = 64, resume: bool = False
    ):
        if rows_per_shard < 1:
            raise InputError(f"rows_per_shard must be >= 1, got {rows_per_shard}")
        if not columns:
            raise InputError("columns must be at least one, got none")
        self.folder, self.columns, self._rows_per_shard = Path(folder), dict(columns), rows_per_shard
        self._rows: list[dict[str, Tensor]] = []
        self._texts: list[str] = []
        self._shards: list[dict[str, Any]] = []
        exists = (self.folder / INDEX).exists()
        if exists and not resume:
            raise InputError(f"{self.folder} contains data already: resume it, or name another folder")
        if exists:
            index = _read_index(self.folder)
            if index.whole:
                raise InputError(f"{self.folder} is complete already: there is nothing to resume")
            if index.columns != self.columns:
                raise InputError(f"{self.folder}: columns must be {index.columns}, got {self.columns}")
            self._shards = index.shards
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_index(whole=False)

    @property
    def written(self) -> int:
        """Number of rows in finished shards."""
        return sum(shard["rows"] for shard in self._shards)

    def add(self, row: Mapping[str, Tensor], text: str = "") -> None:
        """Append a row. Tensors must have the shapes of their columns and are cast to their dtypes.

        text: stored beside the row, for example its prompt.
        """
        if set(row) != set(self.columns):
            raise InputError(f"a row must have {', '.join(self.columns)}, got {', '.join(row)}")
        for name, column in self.columns.items():
            if tuple(row[name].shape) != column.shape:
                raise InputError(f"{name} must be {list(column.shape)}, got {list(row[name].shape)}")
        self._rows.append({name: row[name].to("cpu", _DTYPES[c.dtype]) for name, c in self.columns.items()})
        self._texts.append(text)
        if len(self._rows) == self._rows_per_shard:
            self._flush()

    def close(self) -> None:
        """Write the last shard and mark the folder as complete. Raise InputError if there are no rows."""
        if self._rows:
            self._flush()
        if not self._shards:
            raise InputError(f"{self.folder}: no rows were written")
        self._write_index(whole=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, column in self.columns.items():
            rows = [row[name] for row in self._rows]
            if column.trimmed:
                rows = [row[: _trimmed_length(row)] for row in rows]
                tensors[name] = torch.cat(rows).contiguous()
                tensors[name + _ENDS] = torch.tensor([len(row) for row in rows]).cumsum(0)
            else:
                tensors[name] = torch.stack(rows).contiguous()  # stack keeps the memory format of the rows
        path = self.folder / f"{len(self._shards):05d}.safetensors"
        try:
            with write_atomically(path) as temporary:
                save_file(tensors, temporary, metadata={_TEXTS: json.dumps(self._texts)})
                size, digest = temporary.stat().st_size, sha256_of(temporary)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: the shard cannot be written ({' '.join(str(error).split())})") from error
        self._shards.append({"file": path.name, "rows": len(self._rows), "bytes": size, "sha256": digest})
        self._rows, self._texts = [], []
        self._write_index(whole=False)

    def _write_index(self, *, whole: bool) -> None:
        columns = {name: dataclasses.asdict(column) for name, column in self.columns.items()}
        content = {"format": _FORMAT, "whole": whole, "columns": columns, "shards": self._shards}
        with write_atomically(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class ShardFolder:
    """A reader of a folder of shards: any row at any time, from memory-mapped files.

    CheckpointError names a shard that is missing, truncated or corrupt; rows of other shards stay readable. Raise
    InputError if the folder is not complete.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self._ends = list(itertools.accumulate(shard["rows"] for shard in index.shards))
        if not index.whole:
            so_far = self._ends[-1] if self._ends else 0
            raise InputError(f"{self.folder}: only half-written, {so_far} rows so far: continue with --resume")
        self.columns, self._shards = index.columns, index.shards
        self._open: dict[int, Any] = {}
        for number, shard in enumerate(self._shards):
            self._require_size(number, shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, number: int, names: list[str] | None = None) -> dict[str, Tensor]:
        """Return columns of a row in 0..len - 1, with stored dtypes and full shapes. names: None = all columns."""
        shard, inside = self._place(number)
        return {name: self._tensor(shard, name, inside) for name in (names or self.columns)}

    def text(self, number: int) -> str:
        """Return the text of a row."""
        shard, inside = self._place(number)
        try:
            return json.loads(self._file(shard).metadata()[_TEXTS])[inside]
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"{self._path(shard)}: not a shard of this folder ({error!r})") from error

    def check(self) -> Iterator[tuple[Path, str]]:
        """Read every byte; yield (file, fault) for shards whose contents are not what was written."""
        for number, shard in enumerate(self._shards):
            path = self._path(number)
            try:
                self._require_size(number, shard)
                if sha256_of(path) != shard["sha256"]:
                    yield path, "its bytes have changed since it was written"
            except (CheckpointError, OSError) as error:
                yield path, str(error).removeprefix(f"{path}: ")

    def _place(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise InputError(f"row must be in 0..{len(self) - 1}, got {number}")
        shard = bisect.bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _path(self, shard: int) -> Path:
        return self.folder / self._shards[shard]["file"]

    def _require_size(self, number: int, shard: dict[str, Any]) -> None:
        path = self._path(number)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: the shard cannot be read ({error.strerror})") from error
        if size != shard["bytes"]:
            raise CheckpointError(f"{path}: the shard must have {shard['bytes']} bytes, got {size}: copy it again")

    def _file(self, shard: int) -> Any:
        from safetensors import SafetensorError, safe_open

        if shard not in self._open:
            path = self._path(shard)
            try:
                self._open[shard] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: the shard is corrupt ({' '.join(str(error).split())})") from error
        return self._open[shard]

    def _tensor(self, shard: int, name: str, inside: int) -> Tensor:
        from safetensors import SafetensorError

        column = self.columns[name]
        try:
            stored = self._file(shard).get_slice(name)
            if not column.trimmed:
                tensor = stored[inside]
            else:
                ends = self._file(shard).get_tensor(name + _ENDS).tolist()
                first = ends[inside - 1] if inside else 0
                tensor = torch.zeros(column.shape, dtype=_DTYPES[column.dtype])
                tensor[: ends[inside] - first] = stored[first : ends[inside]]
        except (SafetensorError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self._path(shard)}: the shard is corrupt ({error})") from error
        if tuple(tensor.shape) != column.shape or tensor.dtype != _DTYPES[column.dtype]:
            raise CheckpointError(
                f"{self._path(shard)}: {name} must be {column.dtype} {list(column.shape)} per row,"
                f" got {str(tensor.dtype)[6:]} {list(tensor.shape)}"
            )
        return tensor


@dataclasses.dataclass(frozen=True)
class _Index:
    whole: bool
    columns: dict[str, Column]
    shards: list[dict[str, Any]]


def _read_index(folder: Path) -> _Index:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']!r}")
        columns = {name: Column(**values) for name, values in index["columns"].items()}
        for shard in index["shards"]:
            name = shard["file"]
            if Path(name).name != name or shard["rows"] < 1 or shard["bytes"] < 0 or not shard["sha256"]:
                raise ValueError(f"shard {name!r}")
        return _Index(index["whole"] is True, columns, index["shards"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): wanted a folder of shards") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of {_FORMAT} ({error})") from error


def _trimmed_length(rows: Tensor) -> int:
    """Return the number of rows without the zero rows at the end."""
    filled = rows.flatten(1).ne(0).any(dim=1).nonzero() if rows.ndim > 1 else rows.nonzero()
    return int(filled[-1, 0]) + 1 if len(filled) else 0
