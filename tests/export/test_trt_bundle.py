"""A bundle opens only unchanged, on its own architecture, in its own library; each mismatch is one line."""

import json

import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.export.export_bundle import make_card
from cfpp_rt.export.trt.bundle import open_engine_bundle, write_engine_card
from cfpp_rt.io.atomic import new_folder
from cfpp_rt.model.transformer import random_model
from tests.export.students import ROLLING, TINY

RTX = {"library": "tensorrt-rtx", "version": "1.7.1.116"}


@pytest.fixture(scope="module")
def student():
    import torch

    model = random_model(TINY, seed=0, dtype=torch.float16)
    return make_card(model, ROLLING, latent_size=(4, 6), latent_frames=None)


@pytest.fixture
def folder(tmp_path, student):
    with new_folder(tmp_path / "student", 0) as made:
        for architecture in ("sm80", "sm89"):
            (made / architecture).mkdir()
            (made / architecture / "step.engine").write_bytes(b"vtrt" + architecture.encode() * 99)
        values = {"library": "tensorrt-rtx", "library_version": "1.7.1.116", "weights": "embedded"}
        values["student"] = student.to_dict()
        write_engine_card(made, values, {arch: {"step": {"build_s": 1.5}} for arch in ("sm80", "sm89")})
    return tmp_path / "student"


def test_what_was_written_opens(folder, student):
    opened = open_engine_bundle(folder, architecture="sm89", **RTX)
    assert opened.engines == {"step": folder / "sm89" / "step.engine"} and opened.card == student
    assert opened.values["engines"]["sm89"]["step"]["build_s"] == 1.5
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["student"]


def test_another_architecture_library_or_version(folder):
    with pytest.raises(InputError, match=r"no engines for this GPU \(sm120\), only for sm80, sm89"):
        open_engine_bundle(folder, architecture="sm120", **RTX)
    with pytest.raises(InputError, match=r"do not load in tensorrt-rtx 1.8.0: pip install tensorrt-rtx==1.7.1.116"):
        open_engine_bundle(folder, architecture="sm89", library="tensorrt-rtx", version="1.8.0")
    with pytest.raises(InputError, match="do not load in tensorrt 11.1.0"):
        open_engine_bundle(folder, architecture="sm89", library="tensorrt", version="11.1.0")


def test_a_truncated_tampered_or_missing_engine(folder):
    engine = folder / "sm89" / "step.engine"
    complete = engine.read_bytes()
    engine.write_bytes(complete[:-7])
    with pytest.raises(InputError, match=f"must have {len(complete)} bytes, got {len(complete) - 7}"):
        open_engine_bundle(folder, architecture="sm89", **RTX)
    engine.write_bytes(complete[:50] + bytes([complete[50] ^ 1]) + complete[51:])
    with pytest.raises(InputError, match="is not what was exported"):
        open_engine_bundle(folder, architecture="sm89", **RTX)
    engine.unlink()
    with pytest.raises(InputError, match="the file is missing"):
        open_engine_bundle(folder, architecture="sm89", **RTX)
    open_engine_bundle(folder, architecture="sm80", **RTX)  # the others are untouched


@pytest.mark.parametrize(
    "change,message",
    [
        ({"format": "other"}, "must be the card of a 'cfpp-rt TensorRT bundle', got 'other'"),
        ({"weights": "lost"}, "weights must be embedded, refittable, stripped, got 'lost'"),
        ({"format_version": 1}, "format_version must be 2, got 1: export again"),
        ({"engines": None}, "the card does not fit together"),
        ({"student": {}}, "the card does not fit together: lacks 'sizes'"),
        ({"engines": {"sm89": {"leap": {}}}}, "engines must be of the student's graphs, got leap"),
        ({"engines": {"sm89": {"step": {"file": "sm89/step.engine"}}}}, "does not fit together: lacks 'bytes'"),
        ({"engines": {"sm89": {"step": {"file": "../x", "bytes": 1, "sha256": ""}}}}, "must lie in the bundle"),
    ],
)
def test_a_wrong_card(folder, change, message):
    values = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(InputError, match=message) as caught:
        open_engine_bundle(folder, architecture="sm89", **RTX)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["student", "library", "library_version", "weights", "engines"])
def test_a_card_that_lacks_something(folder, name):
    values = json.loads((folder / "card.json").read_text())
    del values[name]
    (folder / "card.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"lacks '{name}'$"):
        open_engine_bundle(folder, architecture="sm89", **RTX)


def test_no_card_or_half_a_card(folder, tmp_path):
    with pytest.raises(InputError, match="no bundle, it has no card.json"):
        open_engine_bundle(tmp_path, architecture="sm89", **RTX)
    (folder / "card.json").write_text((folder / "card.json").read_text()[:40])
    with pytest.raises(InputError, match="truncated or no card"):
        open_engine_bundle(folder, architecture="sm89", **RTX)
