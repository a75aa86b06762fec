"""Images of Pillow and video frames of PyAV, of any pixel format and orientation, as upright RGB with 8 bits."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.errors import InputError

# FFmpeg draws files of text with these decoders.
_TEXT_CODECS = {"ansi", "bintext", "xbin", "idf"}
# Pillow scales samples of 9 to 16 bits to 16 bits for these formats, and has mode I or I;16 for them.
_SCALED_TO_16_BITS = {"PNG", "PPM", "JPEG2000"}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # tags
_WHITE_IS_ZERO = 0  # value of the tag _TIFF_PHOTOMETRIC


def image_to_rgb(image: Any, path: str | Path) -> Any:
    """Convert a Pillow image of any mode to mode RGB, by value, rotated by its EXIF tag. Transparency is dropped.

    path: the file, named by errors.

    Samples of 16 bits are scaled to 8, float samples are in 0..1. Raises InputError for modes whose white is not known
    and for float samples outside 0..1, and what Pillow raises for modes that it cannot convert.
    """
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if image.mode == "F":
        values = np.asarray(upright)
        if not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
            raise InputError(f"{path}: float samples must be in 0..1, got {values.min():g}..{values.max():g}")
    elif image.mode.startswith("I"):
        values = np.asarray(upright) / _white(image, path)
    else:
        return upright.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 1 - values
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def frame_to_rgb(frame: Any, path: str | Path) -> NDArray[np.uint8]:
    """Convert a PyAV video frame to uint8 [height, width, 3], turned and mirrored as its display matrix says.

    Raises InputError for a rotation that is not a multiple of 90 degrees, and what PyAV raises for a pixel format that
    it cannot convert.
    """
    pixels = frame.to_ndarray(format="rgb24")
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    # A pixel at column x and row y is displayed at column a x + c y and row b x + d y: AVFrame's display matrix.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if (a == d == 0) == (b == c == 0) or 0 in ((b, c) if a == d == 0 else (a, d)):
        raise InputError(f"{path}: a video must be rotated by a multiple of 90 degrees, is by {frame.rotation}")
    if a == d == 0:
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def require_video_codec(name: str, path: str | Path) -> None:
    """Raise InputError for the name of a codec of FFmpeg that draws text as a video."""
    if name in _TEXT_CODECS:
        raise InputError(f"{path}: not a video that can be read (text, which FFmpeg draws with its codec {name})")


def _white(image: Any, path: str | Path) -> int:
    """Return the value of white in an image of integers with more than 8 bits; raise InputError if it is not known."""
    if image.format in _SCALED_TO_16_BITS:
        return 2**16 - 1
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        return 2 ** max(image.tag_v2.get(_TIFF_BITS, (16,))) - 1
    raise InputError(
        f"{path}: integer samples must have 8 or 16 unsigned bits, got mode {image.mode} of {image.format}, whose white"
        " is not known"
    )
