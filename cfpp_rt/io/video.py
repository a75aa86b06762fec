"""Frames to files, and pictures and videos from files."""

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.io.checkpoint import write_atomically
from cfpp_rt.values import Frames

DEFAULT_FPS = 16.0  # of Wan2.1
FORMATS = ("mp4", "png", "raw")
_SUFFIXES = {".mp4": "mp4", ".mov": "mp4", ".mkv": "mp4", ".rgb": "raw", ".raw": "raw"}
# First one that PyAV was built with. All but the last make H.264, which every browser plays.
_ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")
_BT709 = 1  # the code of the H.264 standard for primaries, transfer and matrix alike


class FrameWriter(ABC):
    """What the writers share: use as a context manager, `write` in order, `close` at the end.

    Leaving the context by an exception drops a file that is not finished. row: the video of the batch to write.
    """

    def __init__(self, row: int = 0):
        self._row = row
        self._size: tuple[int, int] | None = None
        self._closed = False

    def write(self, frames: Frames) -> None:
        """Append the pictures of one row. Raises InputError for another dtype, size or number of rows."""
        pixels = frames.pixels
        if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise InputError(f"pixels must be uint8 [B, T, height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
        if not 0 <= self._row < pixels.shape[0]:
            raise InputError(f"row must be in 0..{pixels.shape[0] - 1}, the rows of the batch, got {self._row}")
        size = (pixels.shape[2], pixels.shape[3])
        if self._closed:
            raise InputError("the writer is closed")
        if self._size is None:
            self._begin(*size)
            self._size = size
        elif size != self._size:
            raise InputError(f"pictures must stay {self._size[0]}x{self._size[1]}, got {size[0]}x{size[1]}")
        for offset, picture in enumerate(pixels[self._row].cpu().numpy()):
            self._put(np.ascontiguousarray(picture), frames.start + offset)

    def close(self) -> None:
        """Finish the file. Raises InputError, and leaves no file, if nothing was written."""
        if self._closed:
            return
        if self._size is None:
            self.abort()
            raise InputError("no pictures were written")
        self._closed = True
        self._finish()

    def abort(self) -> None:
        """Drop what is not finished."""
        if not self._closed:
            self._closed = True
            self._drop()

    def __enter__(self) -> "FrameWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _begin(self, height: int, width: int) -> None:
        """Called before the first picture."""

    @abstractmethod
    def _put(self, picture: np.ndarray, index: int) -> None:
        """Called for every picture, uint8 [height, width, 3], with its index in the video."""

    def _finish(self) -> None:
        """Called once, after the last picture."""

    def _drop(self) -> None:
        """Called once, instead of `_finish`."""


class _Dropped(Exception):
    """Leaves `write_atomically` without replacing the file."""


class _AtomicFile:
    """A file that takes its name only when it is finished."""

    def __init__(self, path: str | Path):
        self._stack = contextlib.ExitStack()
        self.path: Path = self._stack.enter_context(write_atomically(path))

    def keep(self) -> None:
        self._stack.close()

    def drop(self) -> None:
        with contextlib.suppress(_Dropped), self._stack:
            raise _Dropped


class Mp4Writer(FrameWriter):
    """H.264 in mp4, mov or mkv (by the suffix), yuv420p, BT.709; written under a temporary name until it is closed.

    path: file to write, replaced if there is one. fps: pictures per second, > 0. crf: quality, 0 (lossless) to 51; used
    by libx264, other encoders get a bit rate. An odd height or width gains one row or column, a copy of its neighbour,
    since colour is stored for 2x2 pixels. Raises InputError where path cannot be written, MissingExtraError without av.
    """

    def __init__(self, path: str | Path, fps: float = DEFAULT_FPS, *, crf: int = 18, row: int = 0):
        super().__init__(row)
        self._av = _import_av()
        if not 0 < fps <= 1000:
            raise InputError(f"fps must be > 0 and <= 1000, got {fps}")
        if not 0 <= crf <= 51:
            raise InputError(f"crf must be in 0..51, got {crf}")
        self._fps = Fraction(fps).limit_denominator(1001)
        self._crf = crf
        self._file = _AtomicFile(path)
        try:
            # Opened now, not at the first picture: a suffix that no container has is found before any work.
            self._container: Any = self._av.open(str(self._file.path), "w", options={"movflags": "+faststart"})
        except (self._av.FFmpegError, ValueError) as error:
            self._file.drop()
            raise InputError(f"{path}: cannot be written as a video ({error})") from error
        self._stream: Any = None

    def _begin(self, height: int, width: int) -> None:
        name = next(name for name in _ENCODERS if _has_encoder(self._av, name))
        stream = self._container.add_stream(name, rate=self._fps)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        if name == "libx264":
            stream.options = {"crf": str(self._crf)}
        else:
            stream.bit_rate = int(0.2 * stream.width * stream.height * self._fps)
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        self._stream = stream

    def _put(self, picture: np.ndarray, index: int) -> None:
        height, width = picture.shape[:2]
        if height % 2 or width % 2:
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        self._container.mux(self._stream.encode(frame))

    def _finish(self) -> None:
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        except BaseException:
            self._file.drop()
            raise
        self._file.keep()

    def _drop(self) -> None:
        with contextlib.suppress(Exception):  # a container without a stream has no trailer to write
            self._container.close()
        self._file.drop()


class PngWriter(FrameWriter):
    """One PNG a picture: `000000.png`, ... by the picture's index in the video. Finished pictures stay after an error.

    folder: made if missing. Raises InputError where it cannot be written, MissingExtraError without Pillow.
    """

    def __init__(self, folder: str | Path, *, row: int = 0):
        super().__init__(row)
        self._image = import_pillow()
        self._folder = Path(folder)
        self._made = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise InputError(f"{folder}: pictures cannot be written there ({error.strerror})") from error

    def _put(self, picture: np.ndarray, index: int) -> None:
        with write_atomically(self._folder / f"{index:06d}.png") as path:
            self._image.fromarray(picture).save(path, format="PNG", compress_level=1)

    def _drop(self) -> None:
        if self._made and not any(self._folder.iterdir()):
            self._folder.rmdir()


class RawWriter(FrameWriter):
    """Bare rgb24 bytes, picture after picture, [T, height, width, 3]; for pipes and tests.

    path: a file, which appears when it is closed, or a pipe. Raises InputError where it cannot be written.
    """

    def __init__(self, path: str | Path, *, row: int = 0):
        super().__init__(row)
        self._file = _AtomicFile(path)
        try:
            self._output: BinaryIO = self._file.path.open("wb")
        except OSError as error:
            self._file.drop()
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error

    def _put(self, picture: np.ndarray, index: int) -> None:
        self._output.write(picture.tobytes())

    def _finish(self) -> None:
        self._output.close()
        self._file.keep()

    def _drop(self) -> None:
        with contextlib.suppress(OSError):
            self._output.close()
        self._file.drop()


def open_writer(
    path: str | Path, format: str | None = None, fps: float = DEFAULT_FPS, *, crf: int = 18, row: int = 0
) -> FrameWriter:
    """The writer for a path, opened at once, so that a path that cannot be written is known before any work.

    format: "mp4", "png" (path is a folder) or "raw"; default by the suffix: .mp4 .mov .mkv, .rgb .raw, none = folder.
    fps: pictures per second of a video file. crf: see `Mp4Writer`. row: the video of the batch to write.
    """
    suffix = Path(path).suffix.lower()
    if format is None:
        format = _SUFFIXES.get(suffix) if suffix else "png"
        if format is None:
            raise InputError(f"{path}: the suffix must be one of {', '.join(_SUFFIXES)} or none for a folder of PNGs")
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "mp4":
        return Mp4Writer(path, fps, crf=crf, row=row)
    return PngWriter(path, row=row) if format == "png" else RawWriter(path, row=row)


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """A picture from a file, float32 [1, 1, 3, height, width] in [-1, 1].

    Turned as its EXIF tag says and resized to the wanted size without cropping, bilinear, as published: another aspect
    ratio is distorted. Raises InputError for a file that is missing or no picture, MissingExtraError without Pillow.
    """
    image_module = import_pillow()
    from PIL import ImageOps

    _require_size(height, width)
    try:
        with image_module.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise InputError(f"{path}: not a picture that can be read ({error})") from error
    return _to_pixels([_resize(upright, height, width)])


def read_video(path: str | Path, height: int, width: int, frames: int | None = None) -> Tensor:
    """The pictures of a video file, float32 [1, T, 3, height, width] in [-1, 1]; resized as `read_image`.

    frames: take only the last so many pictures, e.g. 4 * m - 3 of them to continue a video from; None = all.
    Raises InputError for a file that is missing, no video or too short, MissingExtraError without av or Pillow.
    """
    av, image_module = _import_av(), import_pillow()
    _require_size(height, width)
    if frames is not None and frames < 1:
        raise InputError(f"frames must be >= 1, got {frames}")
    if not Path(path).is_file():
        raise InputError(f"{path}: {'is a folder' if Path(path).is_dir() else 'no such file'}, a video file is needed")
    pictures: deque[np.ndarray] = deque(maxlen=frames)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no video")
            for frame in container.decode(video=0):
                picture = image_module.fromarray(frame.to_ndarray(format="rgb24"))
                pictures.append(_resize(picture, height, width))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: not a video that can be read ({error})") from error
    if len(pictures) < (frames or 1):
        raise InputError(f"{path}: must have at least {frames or 1} pictures, has {len(pictures)}")
    return _to_pixels(list(pictures))


def _require_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise InputError(f"height and width must be >= 1, got {height}x{width}")


def _resize(image: Any, height: int, width: int) -> np.ndarray:
    """A Pillow picture to uint8 [height, width, 3]."""
    if image.size != (width, height):
        image = image.resize((width, height), resample=import_pillow().Resampling.BILINEAR)
    return np.array(image, dtype=np.uint8)


def _to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [height, width, 3] pictures to float32 [1, T, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).unsqueeze(0).float() / 127.5 - 1


def _has_encoder(av: Any, name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except ValueError:  # PyAV's UnknownCodecError
        return False
    return True


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "reading or writing a video file") from error
    return av


def import_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "video", "reading or writing pictures") from error
    return Image
