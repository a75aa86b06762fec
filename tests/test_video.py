import os
import sys

import numpy as np
import pytest
import torch

from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.io.video import Mp4Writer, PngWriter, RawWriter, open_writer, read_image, read_video
from cfpp_rt.values import Frames

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


def gradient(count=9, height=48, width=64, batch=1):
    """Smooth moving frames uint8 [batch, count, height, width, 3], which a codec keeps closely."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (count, height, width)), indexing="ij")
    pixels = torch.stack([x, y, (t + x) / 2], dim=-1) * 255
    return torch.stack([pixels.to(torch.uint8).roll(row, 0) for row in range(batch)])


def write_in_parts(writer, pixels):
    with writer:
        writer.write(Frames(pixels[:, :1], 0))
        writer.write(Frames(pixels[:, 1:5], 1))
        writer.write(Frames(pixels[:, 5:], 5))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
def test_video_file(tmp_path, suffix, height, width):
    path = tmp_path / f"clip{suffix}"
    pixels = gradient(height=height, width=width, batch=2)
    write_in_parts(open_writer(path, fps=12.5, row=1), pixels)
    assert os.listdir(tmp_path) == [path.name]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 12.5 and stream.pix_fmt == "yuv420p"
        decoded = [frame.to_ndarray(format="rgb24", src_colorspace="ITU709") for frame in container.decode(stream)]
    assert len(decoded) == 9
    for frame, wanted in zip(decoded, pixels[1].numpy(), strict=True):
        assert frame.shape == (48, 64, 3)
        assert np.abs(frame[:height, :width].astype(int) - wanted).mean() < 4


def test_unfinished_video_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    for num_frames in (0, 9):
        with pytest.raises(RuntimeError), open_writer(path) as writer:
            if num_frames:
                writer.write(Frames(gradient(num_frames), 0))
            raise RuntimeError
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["clip.mp4"]
    with pytest.raises(InputError, match="no frames were written"):
        open_writer(path).close()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["clip.mp4"]


def test_png_folder(tmp_path):
    pixels = gradient()
    write_in_parts(open_writer(tmp_path / "out" / "frames"), pixels)
    files = sorted((tmp_path / "out" / "frames").iterdir())
    assert [file.name for file in files] == [f"{n:06d}.png" for n in range(9)]
    for file, wanted in zip(files, pixels[0].numpy(), strict=True):
        assert np.array_equal(np.array(Image.open(file)), wanted)


def test_frames_of_an_earlier_video_are_not_mixed_with_new_ones(tmp_path):
    folder = tmp_path / "frames"
    write_in_parts(open_writer(folder), gradient(10))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=r"must be a folder without frames, has 10 .*\(000000.png to 000009.png\)"):
        open_writer(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    for name in ("1000000.png", "000003.png"):  # a long video, and what an error left
        other = tmp_path / name
        other.mkdir()
        (other / name).write_text("")
        with pytest.raises(InputError, match="has 1 of an earlier video"):
            open_writer(other, "png")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("sheet.png", "12.png", "000001.jpg", "notes.txt"):
        (mixed / name).write_text("kept")
    write_in_parts(open_writer(mixed), gradient(9))
    assert len(os.listdir(mixed)) == 13 and (mixed / "sheet.png").read_text() == "kept"


def test_raw_file(tmp_path):
    pixels = gradient(batch=2)
    write_in_parts(open_writer(tmp_path / "clip.rgb", row=1), pixels)
    assert (tmp_path / "clip.rgb").read_bytes() == pixels[1].numpy().tobytes()
    assert os.listdir(tmp_path) == ["clip.rgb"]


def test_the_format_decides(tmp_path):
    for path, format, kind in (
        ("a.mp4", None, Mp4Writer),
        ("b", None, PngWriter),
        ("c.raw", None, RawWriter),
        ("d.mp4", "raw", RawWriter),
        ("e.png", "png", PngWriter),
    ):
        writer = open_writer(tmp_path / path, format)
        assert type(writer) is kind
        writer.abort()
    with pytest.raises(InputError, match="suffix must be one of"):
        open_writer(tmp_path / "clip.gif")
    with pytest.raises(InputError, match="format must be one of mp4, png, raw, got 'gif'"):
        open_writer(tmp_path / "clip.gif", "gif")


def test_unwritable_output_is_known_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("no/such/folder/clip.mp4", "file/clip.mp4", "no/such/clip.rgb", "file/frames"):
        with pytest.raises(InputError, match="written"):
            open_writer(tmp_path / path)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        open_writer(tmp_path / "folder.mp4", "mp4")
    with pytest.raises(InputError, match="cannot be written as a video"):
        open_writer(tmp_path / "clip.unknown", "mp4")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_wrong_frames(tmp_path):
    with pytest.raises(InputError, match="fps must be > 0"):
        open_writer(tmp_path / "clip.mp4", fps=0)
    with pytest.raises(InputError, match="crf must be"):
        open_writer(tmp_path / "clip.mp4", crf=99)
    writer = open_writer(tmp_path / "clip.rgb")
    writer.write(Frames(gradient(), 0))
    for bad in (gradient(height=32), gradient().float(), gradient()[0]):
        with pytest.raises(InputError):
            writer.write(Frames(bad, 9))
    writer.close()
    writer.close()
    with pytest.raises(InputError, match="closed"):
        writer.write(Frames(gradient(), 9))
    with pytest.raises(InputError, match="row must be in 0..0"):
        open_writer(tmp_path / "other.rgb", row=1).write(Frames(gradient(), 0))


def test_read_image(tmp_path):
    image = gradient(1)[0, 0].numpy()
    Image.fromarray(image).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", 48, 64)
    assert pixels.shape == (1, 1, 3, 48, 64) and pixels.dtype == torch.float32
    wanted = torch.from_numpy(image).permute(2, 0, 1) / 255 * 2 - 1
    assert torch.allclose(pixels[0, 0], wanted, atol=1e-6)
    assert read_image(tmp_path / "a.png", 16, 80).shape == (1, 1, 3, 16, 80)
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", 8, 8)[0, 0, :, 0, 0].tolist() == [1, -1, -1]


def test_read_image_turned_by_its_tag(tmp_path):
    image = gradient(1, height=32, width=16)[0, 0].numpy()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    shown = (read_image(tmp_path / "a.png", 16, 32)[0, 0].permute(1, 2, 0) + 1) * 127.5
    assert np.array_equal(shown.round().numpy().astype(np.uint8), np.rot90(image, -1))


def test_unreadable_images(tmp_path):
    Image.fromarray(gradient(1)[0, 0].numpy()).save(tmp_path / "complete.png")
    complete = (tmp_path / "complete.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_text("")
    for name in ("missing.png", "text.png", "empty.png", "cut.png"):
        with pytest.raises(InputError, match=f"{name}: "):
            read_image(tmp_path / name, 16, 16)
    with pytest.raises(InputError, match="height and width"):
        read_image(tmp_path / "complete.png", 0, 16)


def test_read_video(tmp_path):
    pixels = gradient()
    write_in_parts(open_writer(tmp_path / "a.mp4"), pixels)
    read = read_video(tmp_path / "a.mp4", 48, 64)
    assert read.shape == (1, 9, 3, 48, 64) and read.dtype == torch.float32
    wanted = pixels.movedim(-1, 2) / 127.5 - 1
    assert (read - wanted).abs().mean() < 0.05
    assert torch.equal(read_video(tmp_path / "a.mp4", 48, 64, num_frames=5), read[:, -5:])
    assert read_video(tmp_path / "a.mp4", 16, 24, num_frames=1).shape == (1, 1, 3, 16, 24)
    with pytest.raises(InputError, match="at least 10 frames, has 9"):
        read_video(tmp_path / "a.mp4", 48, 64, num_frames=10)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(InputError, match=f"{name}: "):
            read_video(tmp_path / name, 16, 16)


def test_missing_extras(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match="'av'"):
        open_writer(tmp_path / "a.mp4")
    assert not os.listdir(tmp_path)
