"""Writers of frames to files, and readers of images and videos."""

import contextlib
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from fractions import Fraction
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.io.atomic import AtomicFile, is_pipe_or_device, write_atomically
from cfpp_rt.io.rgb import frame_to_rgb, image_to_rgb, require_video_codec
from cfpp_rt.values import Frames

DEFAULT_FPS = 16.0  # the rate of Wan2.1
FORMATS = ("mp4", "png", "raw")
_SUFFIXES = {".mp4": "mp4", ".mov": "mp4", ".mkv": "mp4", ".rgb": "raw", ".raw": "raw"}
# The first that PyAV was built with is used. All but the last write H.264, which every browser plays.
_ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")
# For libx264: twice as fast as its default at 384x384, three times at 480x832; files no larger, 0.4 dB less at most.
_PRESET = "veryfast"
_ONE_THREAD_PIXELS = 512 * 512  # one core encodes 100 frames of this size per second
_FRAME_NAME = re.compile(r"\d{6,}\.png")  # of `PngWriter`
_BT709 = 1  # the code of the H.264 standard for primaries, transfer and matrix alike


class FrameWriter(ABC):
    """Base of the writers: a context manager; call `write` with frames in order, then `close`.

    row: the row of the batch to write.

    If the context is left by an exception, an unfinished file is dropped.
    """

    def __init__(self, row: int = 0):
        self._row = row
        self._size: tuple[int, int] | None = None
        self._closed = False

    def write(self, frames: Frames) -> None:
        """Append the frames of one row of the batch. Raises InputError for another dtype, size or number of rows."""
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
            raise InputError(f"frames must stay {self._size[0]}x{self._size[1]}, got {size[0]}x{size[1]}")
        for offset, frame in enumerate(pixels[self._row].cpu().numpy()):
            self._put(np.ascontiguousarray(frame), frames.start + offset)

    def close(self) -> None:
        """Finish the file. Raises InputError, and leaves no file, if nothing was written."""
        if self._closed:
            return
        if self._size is None:
            self.abort()
            raise InputError("no frames were written")
        self._closed = True
        self._finish()

    def abort(self) -> None:
        """Drop the unfinished file."""
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
        """Prepare for frames of this size; called before the first frame."""

    @abstractmethod
    def _put(self, frame: np.ndarray, index: int) -> None:
        """Write a frame, uint8 [height, width, 3]. index: its position in the video."""

    def _finish(self) -> None:
        """Finish the file; called once, after the last frame."""

    def _drop(self) -> None:
        """Drop the unfinished file; called once, instead of `_finish`."""


class Mp4Writer(FrameWriter):
    """Writer of H.264 in mp4, mov or mkv (by the suffix), yuv420p, BT.709.

    path: file to write, under a temporary name until the writer is closed; an existing file is replaced.
    fps: frames per second, > 0.
    crf: quality, 0 (lossless) to 51; used by libx264, other encoders get a bit rate.
    row: the row of the batch to write.

    An odd height or width is padded by a copy of the last row or column, since colour is stored per 2x2 pixels.
    Raises InputError if path cannot be written or is a pipe or device, MissingExtraError without av.
    """

    def __init__(self, path: str | Path, fps: float = DEFAULT_FPS, *, crf: int = 18, row: int = 0):
        super().__init__(row)
        self._av = _import_av()
        if not 0 < fps <= 1000:
            raise InputError(f"fps must be > 0 and <= 1000, got {fps}")
        if not 0 <= crf <= 51:
            raise InputError(f"crf must be in 0..51, got {crf}")
        if is_pipe_or_device(path):
            raise InputError(f"{path}: a video file must be no pipe or device: those take raw frames, FILE.rgb")
        self._fps = Fraction(fps).limit_denominator(1001)
        self._crf = crf
        self._file = AtomicFile(path)
        try:
            # Opened now, not at the first frame, so that an unknown suffix is refused before any work.
            # Matroska has no such flag, and its muxer warns of it.
            options = {} if Path(path).suffix == ".mkv" else {"movflags": "+faststart"}
            self._container: Any = self._av.open(str(self._file.path), "w", options=options)
        except (self._av.FFmpegError, ValueError) as error:
            self._file.drop()
            raise InputError(f"{path}: cannot be written as a video ({error})") from error
        self._stream: Any = None
        self._converter = self._av.video.reformatter.VideoReformatter()  # reused for all frames: it caches its tables

    def _begin(self, height: int, width: int) -> None:
        name = next(name for name in _ENCODERS if _has_encoder(self._av, name))
        stream = self._container.add_stream(name, rate=self._fps)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        # Without a limit the encoder uses all cores, which the runtime needs.
        stream.codec_context.thread_count = 1 if stream.width * stream.height <= _ONE_THREAD_PIXELS else 2
        if name == "libx264":
            stream.options = {"crf": str(self._crf), "preset": _PRESET}
        else:
            stream.bit_rate = int(0.2 * stream.width * stream.height * self._fps)
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        self._stream = stream

    def _put(self, frame: np.ndarray, index: int) -> None:
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        rgb = self._av.VideoFrame.from_ndarray(frame, format="rgb24")
        yuv = self._converter.reformat(rgb, format="yuv420p", dst_colorspace="ITU709")
        self._container.mux(self._stream.encode(yuv))

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
    """Writer of one PNG per frame: `000000.png`, ... by index in the video. Finished files stay after an error.

    folder: created if missing. It must not contain frames of an earlier video, which would be mixed with the new ones.
    row: the row of the batch to write.

    Raises InputError if the folder contains frames or cannot be written, MissingExtraError without Pillow.
    """

    def __init__(self, folder: str | Path, *, row: int = 0):
        super().__init__(row)
        self._image = import_pillow()
        self._folder = Path(folder)
        self._is_new = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise InputError(f"{folder}: frames cannot be written there ({error.strerror})") from error
        earlier = sorted(path.name for path in self._folder.iterdir() if _FRAME_NAME.fullmatch(path.name))
        if earlier:
            raise InputError(
                f"{folder}: must be a folder without frames, has {len(earlier)} of an earlier video"
                f" ({earlier[0]} to {earlier[-1]}): remove them or choose another folder"
            )

    def _put(self, frame: np.ndarray, index: int) -> None:
        with write_atomically(self._folder / f"{index:06d}.png") as path:
            self._image.fromarray(frame).save(path, format="PNG", compress_level=1)

    def _drop(self) -> None:
        if self._is_new and not any(self._folder.iterdir()):
            self._folder.rmdir()


class RawWriter(FrameWriter):
    """Writer of rgb24 bytes without a header, uint8 [T, height, width, 3]; for pipes and tests.

    path: a file, which appears when the writer is closed, or a pipe. A pipe is opened at the first frame, which waits
        for its reader: if it were opened and closed without a frame, the reader would see the end.
    row: the row of the batch to write.

    Raises InputError if path cannot be written, also while frames are written.
    """

    def __init__(self, path: str | Path, *, row: int = 0):
        super().__init__(row)
        self._path = path
        self._output: FileIO | None = None
        self._file = AtomicFile(path)
        if not is_pipe_or_device(path):
            self._output = self._open()
        elif not os.access(path, os.W_OK):
            raise InputError(f"{path}: cannot be written (Permission denied)")

    def _open(self) -> FileIO:
        try:
            return self._file.path.open("wb", buffering=0)
        except OSError as error:
            self._file.drop()
            raise self._refusal(error) from error

    def _begin(self, height: int, width: int) -> None:
        self._output = self._output or self._open()

    def _put(self, frame: np.ndarray, index: int) -> None:
        assert self._output is not None
        left = frame.data.cast("B")
        try:
            while left:  # a write to a pipe may be partial
                left = left[self._output.write(left) :]
        except OSError as error:
            raise self._refusal(error) from error

    def _finish(self) -> None:
        assert self._output is not None
        try:
            self._output.close()
        except OSError as error:
            self._file.drop()
            raise self._refusal(error) from error
        self._file.keep()

    def _drop(self) -> None:
        if self._output is not None:
            with contextlib.suppress(OSError):
                self._output.close()
        self._file.drop()

    def _refusal(self, error: OSError) -> InputError:
        return InputError(f"{self._path}: cannot be written ({error.strerror})")


def open_writer(
    path: str | Path, format: str | None = None, fps: float = DEFAULT_FPS, *, crf: int = 18, row: int = 0
) -> FrameWriter:
    """Open the writer for a path, at once, so that a path that cannot be written is refused before any work.

    format: "mp4", "png" (path is a folder) or "raw"; None = by the suffix: .mp4 .mov .mkv, .rgb .raw, none = folder.
    fps, crf: see `Mp4Writer`.
    row: the row of the batch to write.

    Raises InputError for an unknown format or suffix, and what the writer raises.
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
    """Read an image from a file: float32 [1, 1, 3, height, width] in [-1, 1].

    The image is converted as `image_to_rgb` says, rotated by its EXIF tag, and resized bilinearly without cropping, as
    in the published code, so another aspect ratio is distorted. Raises InputError if the file is missing or not an
    image, MissingExtraError without Pillow.
    """
    image_module = import_pillow()
    _require_size(height, width)
    try:
        with image_module.open(path) as image:
            upright = image_to_rgb(image, path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({error})") from error
    return _to_pixels([_resize(upright, height, width)])


def read_video(path: str | Path, height: int, width: int, num_frames: int | None = None) -> Tensor:
    """Read the frames of a video file, resized like `read_image`: float32 [1, T, 3, height, width] in [-1, 1].

    Frames are turned as the video's display matrix says, such as those of phones.

    num_frames: read only the last num_frames frames, such as 4 * m - 3 to continue the video; None = all.

    Raises InputError if the file is missing, not a video or too short, MissingExtraError without av or Pillow.
    """
    av, image_module = _import_av(), import_pillow()
    _require_size(height, width)
    if num_frames is not None and num_frames < 1:
        raise InputError(f"num_frames must be >= 1, got {num_frames}")
    if not Path(path).is_file():
        raise InputError(f"{path}: {'is a folder' if Path(path).is_dir() else 'no such file'}, a video file is needed")
    frames: deque[np.ndarray] = deque(maxlen=num_frames)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: contains no video")
            require_video_codec(container.streams.video[0].codec_context.name, path)
            for frame in container.decode(video=0):
                image = image_module.fromarray(np.ascontiguousarray(frame_to_rgb(frame, path)))
                frames.append(_resize(image, height, width))
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a video that can be read ({error})") from error
    if len(frames) < (num_frames or 1):
        raise InputError(f"{path}: must have at least {num_frames or 1} frames, has {len(frames)}")
    return _to_pixels(list(frames))


def _require_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise InputError(f"height and width must be >= 1, got {height}x{width}")


def _resize(image: Any, height: int, width: int) -> np.ndarray:
    """Resize a Pillow image and convert it to uint8 [height, width, 3]."""
    if image.size != (width, height):
        image = image.resize((width, height), resample=import_pillow().Resampling.BILINEAR)
    return np.array(image, dtype=np.uint8)


def _to_pixels(frames: list[np.ndarray]) -> Tensor:
    """Convert uint8 [height, width, 3] frames to float32 [1, T, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1).unsqueeze(0).float() / 127.5 - 1


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
    """Import `PIL.Image`. Raises MissingExtraError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "video", "reading or writing images") from error
    return Image
