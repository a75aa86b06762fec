"""A bundle is written whole or not at all, and opens only unchanged, on its own architecture, in its own library."""

import errno
import json

import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.export.trt.bundle import new_folder, open_bundle, require_space, write_card

RTX = {"library": "tensorrt-rtx", "version": "1.7.1.116"}


@pytest.fixture
def folder(tmp_path):
    with new_folder(tmp_path / "student") as made:
        for architecture in ("sm80", "sm89"):
            (made / architecture).mkdir()
            (made / architecture / "step.engine").write_bytes(b"vtrt" + architecture.encode() * 99)
        card = {"library": "tensorrt-rtx", "library_version": "1.7.1.116", "steps": [1000, 500]}
        write_card(made, card, {arch: {"step": {"build_s": 1.5}} for arch in ("sm80", "sm89")})
    return tmp_path / "student"


def test_what_was_written_opens(folder):
    opened = open_bundle(folder, architecture="sm89", **RTX)
    assert opened.engines == {"step": folder / "sm89" / "step.engine"} and opened.card["steps"] == [1000, 500]
    assert opened.card["engines"]["sm89"]["step"]["build_s"] == 1.5
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["student"]


def test_another_architecture_library_or_version(folder):
    with pytest.raises(InputError, match=r"no engines for this GPU \(sm120\), only for sm80, sm89"):
        open_bundle(folder, architecture="sm120", **RTX)
    with pytest.raises(InputError, match=r"do not load in tensorrt-rtx 1.8.0: pip install tensorrt-rtx==1.7.1.116"):
        open_bundle(folder, architecture="sm89", library="tensorrt-rtx", version="1.8.0")
    with pytest.raises(InputError, match="do not load in tensorrt 11.1.0"):
        open_bundle(folder, architecture="sm89", library="tensorrt", version="11.1.0")


def test_a_truncated_tampered_or_missing_engine(folder):
    engine = folder / "sm89" / "step.engine"
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-7])
    with pytest.raises(InputError, match=f"must have {len(whole)} bytes, got {len(whole) - 7}"):
        open_bundle(folder, architecture="sm89", **RTX)
    engine.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(InputError, match="not those that were built"):
        open_bundle(folder, architecture="sm89", **RTX)
    engine.unlink()
    with pytest.raises(InputError, match="the engine is missing"):
        open_bundle(folder, architecture="sm89", **RTX)
    open_bundle(folder, architecture="sm80", **RTX)  # the others are untouched


@pytest.mark.parametrize(
    "change,message",
    [
        ({"format": "other"}, "must be the card of a"),
        ({"format_version": 2}, "format version must be 1, got 2"),
        ({"engines": None}, "lacks its engines"),
        ({"engines": {"sm89": {"step": {"file": "sm89/step.engine"}}}}, "lacks its file, bytes or sha256"),
        ({"engines": {"sm89": {"step": {"file": "../x", "bytes": 1, "sha256": ""}}}}, "must lie in the bundle"),
    ],
)
def test_a_wrong_card(folder, change, message):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(InputError, match=message):
        open_bundle(folder, architecture="sm89", **RTX)


def test_no_card_or_half_a_card(folder, tmp_path):
    with pytest.raises(InputError, match=r"no engine bundle, it has no card.json"):
        open_bundle(tmp_path, architecture="sm89", **RTX)
    (folder / "card.json").write_text((folder / "card.json").read_text()[:40])
    with pytest.raises(InputError, match="truncated or no card"):
        open_bundle(folder, architecture="sm89", **RTX)


def test_a_failed_body_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "student") as made:
        (made / "sm89").mkdir()
        raise ZeroDivisionError
    with pytest.raises(InputError, match="no space left"), new_folder(tmp_path / "student"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_never_written_over(folder):
    with pytest.raises(InputError, match="exists already"), new_folder(folder):
        pass
    with pytest.raises(InputError, match="cannot be written"), new_folder(folder / "card.json" / "x"):
        pass
    open_bundle(folder, architecture="sm89", **RTX)


def test_room_is_asked_for_before_anything_is_built(tmp_path):
    require_space(tmp_path / "student", 1)
    with pytest.raises(InputError, match="engines need about .* MiB free"):
        require_space(tmp_path / "student", 2**60)
