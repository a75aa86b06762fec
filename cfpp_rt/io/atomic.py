"""Files and folders that appear complete or not at all: written under a temporary name, then renamed."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from cfpp_rt.errors import InputError

_SPACE_MARGIN = 64 << 20  # bytes that must stay free on the disk


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of `path`, which replaces `path` if the body succeeds.

    The temporary name keeps the suffix. A body that raises leaves `path` as it was and no temporary file. A pipe or
    device is yielded itself: it must not be replaced by a file.

    Raises InputError before the body runs if `path` cannot be written.
    """
    if is_pipe_or_device(path):
        yield Path(path)
        return
    target = Path(path).resolve()  # a link stays, the file that it points to is replaced
    temporary = _temporary_name(target, target.suffix)
    try:
        temporary.open("xb").close()
        mode = stat.S_IMODE(temporary.stat().st_mode)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        yield temporary
        temporary.chmod(mode)  # by the umask, also if a library has made the file again for its owner alone
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class AtomicFile:
    """A file of `write_atomically` that is kept or dropped by a call, not at the end of a with statement.

    path: the temporary file to write.
    """

    def __init__(self, path: str | Path):
        self._stack = contextlib.ExitStack()
        self.path: Path = self._stack.enter_context(write_atomically(path))

    def keep(self) -> None:
        """Rename the file to its final name."""
        self._stack.close()

    def drop(self) -> None:
        """Remove the file."""
        with contextlib.suppress(_Dropped), self._stack:
            raise _Dropped


def is_pipe_or_device(path: str | Path) -> bool:
    """Return True if `path` is something that must not be replaced by a file, such as a named pipe.

    Raises InputError for a folder and for a name that cannot exist.
    """
    target = Path(path)
    try:
        special = target.exists() and not target.is_file()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    if special and target.is_dir():
        raise InputError(f"{target}: is a folder, a file name is needed")
    return special


def require_writable(path: str | Path, option: str, *, append: bool = False, pipe: bool = True) -> None:
    """Raise InputError, which begins with `option`, if a file cannot be written; for use before the work for it begins.

    append: True if an existing file is continued, not replaced.
    pipe: False refuses pipes and devices. They are never opened here: the reader of a pipe would see its end.
    """
    try:
        if is_pipe_or_device(path):
            if not pipe:
                raise InputError(f"{path}: must be a file, is a pipe or a device")
            if not os.access(path, os.W_OK):
                raise InputError(f"{path}: cannot be written (Permission denied)")
        elif append and Path(path).exists():
            Path(path).open("ab").close()
        else:
            AtomicFile(path).drop()
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"{option} {error}") from error


def require_new_folder(target: str | Path, option: str) -> None:
    """Raise InputError, which begins with `option`, if `new_folder` would refuse `target`; leaves nothing."""
    try:
        with contextlib.suppress(_Dropped), new_folder(target, 0):
            raise _Dropped
    except InputError as error:
        raise InputError(f"{option} {error}") from error


class _Dropped(Exception):
    """Raised to leave `write_atomically` and `new_folder` without a result."""


@contextlib.contextmanager
def new_folder(target: str | Path, needed_bytes: int) -> Iterator[Path]:
    """Yield an empty temporary folder, which is renamed to `target` if the body succeeds and removed if it raises.

    Raises InputError if `target` exists or cannot be made, or the disk has no room for `needed_bytes`.
    """
    target = Path(target).resolve()
    if target.exists():
        raise InputError(f"{target}: exists already, and a bundle is never written over: choose another name")
    temporary = _temporary_name(target)
    try:
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        free = shutil.disk_usage(temporary).free
        if free < needed_bytes + _SPACE_MARGIN:
            needed = needed_bytes + _SPACE_MARGIN >> 20
            raise InputError(f"{target}: needs {needed} MiB, a margin included, the disk has {free >> 20} MiB free")
        yield temporary
        os.rename(temporary, target)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(f"{target}: no space left on the disk") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(target: Path, suffix: str = "") -> Path:
    """Return a hidden, unused name in the folder of `target`. suffix: the end of the name of `target` to keep."""
    stem = target.name.removesuffix(suffix)
    return target.with_name(f".{stem[:100]}.{secrets.token_hex(4)}{suffix}")
