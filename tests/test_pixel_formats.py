"""Images and videos of any pixel format and orientation are read by value, or refused by name."""

import struct

import numpy as np
import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.io.video import Mp4Writer, read_image, read_video
from cfpp_rt.values import Frames

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


def grey_levels(path) -> list[float]:
    """The first row of an image of four columns, in 0..255; its channels must be equal."""
    pixels = (read_image(path, 2, 4)[0, 0].numpy() + 1) * 127.5
    assert np.ptp(pixels, axis=0).max() == 0
    return pixels[0, 0].round(3).tolist()


LEVELS = np.array([[0, 50, 128, 255]] * 2)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2"])
def test_grey_of_16_bits_is_read_by_value(tmp_path, name):
    Image.fromarray((LEVELS * 257).astype(np.uint16)).save(tmp_path / name)
    assert grey_levels(tmp_path / name) == [0, 50, 128, 255]


def test_tiff_whose_zero_is_white(tmp_path):
    for kind in (np.uint16, np.float32):
        scale = 257 if kind is np.uint16 else 1 / 255
        Image.fromarray((LEVELS * scale).astype(kind)).save(tmp_path / "a.tif", tiffinfo={262: 0})
        assert grey_levels(tmp_path / "a.tif") == [255, 205, 127, 0]


@pytest.mark.parametrize("white", [255, 1023, 65535])
def test_pgm(tmp_path, white):
    values = (LEVELS / 255 * white).round().astype(">u2" if white > 255 else np.uint8)
    (tmp_path / "a.pgm").write_bytes(b"P5 4 2 %d\n" % white + values.tobytes())
    assert grey_levels(tmp_path / "a.pgm") == [0, 50, 128, 255]


def test_float_is_read_by_value_and_refused_outside(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.float32(LEVELS / 255)).save(path)
    assert grey_levels(path) == [0, 50, 128, 255]
    for worst in (255.0, -0.1, float("nan"), float("inf")):
        values = np.float32(LEVELS / 255)
        values[1, 1] = worst
        Image.fromarray(values).save(path)
        with pytest.raises(InputError, match=r"a.tif: float samples must be in 0\.\.1, got "):
            read_image(path, 2, 4)


def test_integers_of_32_bits_are_refused(tmp_path):
    Image.fromarray(LEVELS.astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif: integer samples must have 8 or 16 unsigned bits, got mode I of TIFF"):
        read_image(tmp_path / "a.tif", 2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "F"])
def test_every_mode_that_a_tiff_has(tmp_path, mode):
    grey = Image.fromarray(np.repeat([[0, 255]], 2, axis=1).repeat(2, axis=0).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    else:
        image = grey.convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif" if mode not in ("P",) else tmp_path / "a.png")
    path = next(tmp_path.iterdir())
    assert Image.open(path).mode == mode
    pixels = read_image(path, 2, 4)[0, 0].numpy()
    np.testing.assert_allclose(pixels[:, 0, 0], -1, atol=0.02)
    np.testing.assert_allclose(pixels[:, 0, 3], 1, atol=0.02)


def test_grey_of_16_bits_is_turned_by_its_tag(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed turned by 90 degrees clockwise
    column = (np.array([[0], [50], [128], [255]]) * 257).astype(np.uint16)[:, [0, 0]]
    Image.fromarray(column).save(tmp_path / "a.png", exif=exif)
    assert grey_levels(tmp_path / "a.png") == [255, 128, 50, 0]


QUADRANTS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)


def quadrants(height: int, width: int) -> np.ndarray:
    return QUADRANTS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


# a, b, c, d of the matrix and what is displayed: columns to a x + c y, rows to b x + d y
ORIENTATIONS = {
    "as stored": ((1, 0, 0, 1), lambda x: x),
    "90 clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "90 counter-clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
}


def set_matrix(path, a, b, c, d):
    """Write the display matrix of an mp4 file, 16.16 fixed point, into its track header."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    one = 1 << 16
    matrix = (round(a * one), round(b * one), 0, round(c * one), round(d * one), 0, 0, 0, 1 << 30)
    content[place : place + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_video_is_turned_as_its_display_matrix_says(tmp_path, name):
    import torch

    matrix, turn = ORIENTATIONS[name]
    path = tmp_path / "phone.mp4"
    with Mp4Writer(path, crf=1) as writer:
        writer.write(Frames(torch.from_numpy(quadrants(32, 48))[None, None].repeat(1, 3, 1, 1, 1), 0))
    set_matrix(path, *matrix)
    wanted = turn(quadrants(32, 48))
    read = (read_video(path, *wanted.shape[:2])[0].movedim(1, -1).numpy() + 1) * 127.5
    assert read.shape == (3, *wanted.shape)
    for y in (8, -8):  # the centres of the quadrants: colours smear at their edges
        for x in (8, -8):
            assert np.abs(read[:, y, x] - wanted[y, x]).max() < 60, (name, y, x)


def test_another_angle_is_refused(tmp_path):
    import torch

    path = tmp_path / "phone.mp4"
    with Mp4Writer(path) as writer:
        writer.write(Frames(torch.zeros(1, 2, 32, 48, 3, dtype=torch.uint8), 0))
    set_matrix(path, 0.7071, 0.7071, -0.7071, 0.7071)
    with pytest.raises(InputError, match="phone.mp4: a video must be rotated by a multiple of 90 degrees, is by -45"):
        read_video(path, 32, 48)


@pytest.mark.parametrize(
    "pix_fmt",
    ["gray10le", "gray16le", "yuv420p", "yuv422p10le", "yuv444p16le", "yuva420p", "gbrp16le", "bgra", "rgb48le", "ya8"],
)
def test_videos_of_any_pixel_format_are_read_by_value(tmp_path, pix_fmt):
    path, colour = tmp_path / "a.nut", np.array([200, 100, 50], np.uint8)
    if pix_fmt[0] in "gy" and "uv" not in pix_fmt and "b" not in pix_fmt:  # grey
        colour = np.array([125, 125, 125], np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (48, 64, 3)).copy(), format="rgb24")
        container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode(None))
    read = (read_video(path, 48, 64)[0, 0].movedim(0, -1).numpy() + 1) * 127.5
    assert np.abs(read - colour).max() <= 3


@pytest.mark.parametrize("name", ["story.txt", "story.nfo", "story.ans"])
def test_a_text_file_is_not_a_video(tmp_path, name):
    (tmp_path / name).write_text("Once upon a time.\n" * 100)
    with pytest.raises(InputError, match=f"{name}: not a video that can be read"):
        read_video(tmp_path / name, 32, 48)
