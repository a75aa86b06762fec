"""Cameras, their matrices, and trajectories from text: against the published ones, and by their properties."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cfpp_rt.core.camera import INTRINSICS, Cameras, invert, parse_cameras, parse_trajectory, views_from_poses, walk
from cfpp_rt.errors import InputError
from cfpp_rt.model.projections import Projections

EYE = np.eye(4)
KEYS = ["w", "s", "a", "d", "u", "dn", "j", "l", "i", "k"]


def test_the_published_trajectory():
    wanted = load_file(Path(__file__).parent / "data" / "camera_vectors.safetensors")["viewmats"][0]
    torch.testing.assert_close(torch.from_numpy(parse_trajectory("w*2,j*2,d*1")).float(), wanted, rtol=0, atol=1e-6)


def test_units_are_latent_frames_after_the_first():
    views = parse_trajectory(" w*19 ")
    assert views.shape == (20, 4, 4) and np.array_equal(views[0], EYE)
    assert np.allclose(views[19, :3, 3], [0, 0, -19 * 0.08])


@pytest.mark.parametrize(
    "key,moved",
    [("w", (0, 0, 0.08)), ("s", (0, 0, -0.08)), ("d", (0.08, 0, 0)), ("a", (-0.08, 0, 0)), ("u", (0, -0.08, 0))]
    + [("dn", (0, 0.08, 0))],
)
def test_steps(key, moved):
    """Where the camera stands: x right, y down, z forward."""
    camera = invert(parse_trajectory(f"{key}*1")[1])
    assert np.array_equal(camera[:3, :3], EYE[:3, :3])
    assert np.allclose(camera[:3, 3], moved)


@pytest.mark.parametrize(
    "key,seen", [("l", (1, 0)), ("j", (-1, 0)), ("i", (0, -1)), ("k", (0, 1))], ids=["right", "left", "up", "down"]
)
def test_turns(key, seen):
    """The direction of view: 30 degrees to the right is towards +x, up is towards -y."""
    forward = invert(parse_trajectory(f"{key}*10")[-1])[:3, 2]
    x, y = (math.sin(math.radians(30)) * part for part in seen)
    assert np.allclose(forward, [x, y, math.cos(math.radians(30))])


def test_every_key_moves_the_camera_as_it_then_stands():
    """Turned right by 90 degrees, forward is +x; a full turn comes back."""
    camera = invert(parse_trajectory("l*30,w*10")[-1])
    assert np.allclose(camera[:3, 3], [0.8, 0, 0])
    assert np.allclose(parse_trajectory("l*120")[-1], EYE)
    assert np.allclose(parse_trajectory("w*4,l*7,i*3,k*3,j*7,s*4")[-1], EYE)


@given(keys=st.lists(st.sampled_from(KEYS), max_size=12), more=st.lists(st.sampled_from(KEYS), max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_walk_goes_on_from_where_it_stands(keys, more):
    both = walk(keys + more, EYE)
    first = walk(keys, EYE)
    assert np.array_equal(first, both[: len(keys)])
    rest = walk(more, first[-1] if keys else EYE)
    assert np.allclose(rest, both[len(keys) :])
    if keys:
        assert np.array_equal(parse_trajectory(",".join(f"{key}*1" for key in keys))[1:], first)


@pytest.mark.parametrize(
    "text,part",
    [
        ("w*4,wj*3", "wj*3"),
        ("w*4,w+j*3", "w+j*3"),
        ("w*4,x*3", "x*3"),
        ("w*0", "w*0"),
        ("w*-1", "w*-1"),
        ("w", "w"),
        ("w*2.5", "w*2.5"),
        ("w*2,", ""),
        ("", ""),
        ("w-2", "w-2"),
        ("w*9999999", "w*9999999"),
        ("W*2", "W*2"),
    ],
)
def test_bad_parts_are_named(text, part):
    with pytest.raises(InputError, match="trajectory must be parts KEY.COUNT") as error:
        parse_trajectory(text)
    assert str(error.value).endswith(f"got the part {part!r}")


def test_a_bad_key_is_named():
    with pytest.raises(InputError, match="key must be one of w s a d u dn j l i k, got 'up'"):
        walk(["w", "up"], EYE)


@st.composite
def cameras(draw):
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=60))
    skipped = draw(st.integers(0, len(keys) - 1))  # so that the first camera need not be the identity
    focal = draw(st.tuples(st.floats(0.2, 4), st.floats(0.2, 4)))
    return Cameras.of(walk(keys, EYE)[skipped:], focal)


@given(made=cameras())
@settings(max_examples=60, deadline=None)
def test_projections_are_k_times_v_and_its_inverse(made):
    projections = Projections.of(made)
    assert projections.matrices.dtype == projections.inverses.dtype == torch.float32
    both = projections.inverses.double() @ projections.matrices.double()
    torch.testing.assert_close(both, torch.from_numpy(EYE).expand_as(both), rtol=0, atol=1e-5)
    lens = np.concatenate([made.focal, np.ones_like(made.focal)], 2)[..., None] * EYE
    np.testing.assert_allclose(projections.matrices, (lens @ made.views).astype(np.float32), rtol=0, atol=1e-6)
    np.testing.assert_allclose(invert(invert(made.views)), made.views, rtol=1e-7, atol=1e-7)


@given(made=cameras())
@settings(max_examples=30, deadline=None)
def test_another_world_changes_no_pair_of_frames(made):
    ours, theirs = Projections.of(made), Projections.of(made.from_first())
    for i in range(len(made)):
        pairs = [p.matrices[:, i : i + 1].double() @ p.inverses.double() for p in (ours, theirs)]
        torch.testing.assert_close(*pairs, rtol=0, atol=1e-5)
    assert np.allclose(made.from_first().views[:, 0], EYE)


def test_every_form_of_intrinsics_is_the_same_lens():
    views = parse_trajectory("w*2")
    matrix = torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]], dtype=torch.float64)
    made = [Cameras.of(views, lens) for lens in ((0.6, 0.9), matrix, matrix.expand(1, 3, 3, 3), matrix.numpy())]
    assert all(np.array_equal(one.focal, made[0].focal) and len(one) == 3 for one in made)
    assert np.array_equal(made[0].focal[0, 2], [0.6, 0.9])


def test_training_intrinsics_are_the_default_and_both_conventions_are_there():
    assert Cameras.of(EYE[None]).focal.tolist() == [[list(INTRINSICS["training"])]]
    assert INTRINSICS["training"] == pytest.approx((0.50505, 0.89787), abs=1e-5)
    assert INTRINSICS["published-cli"] == (0.5, 0.5)


def bent(change):
    views = torch.from_numpy(parse_trajectory("w*2,j*1")).repeat(2, 1, 1, 1)
    change(views)
    return views


@pytest.mark.parametrize(
    "views,message",
    [
        (torch.eye(4), r"views must be \[B, F, 4, 4\] or \[F, 4, 4\]"),
        (torch.eye(3).expand(1, 2, 3, 3), r"views must be \[B, F, 4, 4\]"),
        (torch.zeros(1, 0, 4, 4), "none of them 0"),
        (bent(lambda v: v[1, 2, 0, 3].fill_(float("nan"))), "views must be finite"),
        (bent(lambda v: v[1, 2, :3, :3].mul_(1.01)), r"views must be rigid.*views\[1, 2\] is"),
        (bent(lambda v: v[0, 1, 0].mul_(-1)), r"views must be rigid.*views\[0, 1\] is"),
        (bent(lambda v: v[0, 3, 3, 0].fill_(0.5)), r"views must be rigid.*views\[0, 3\] is"),
        (bent(lambda v: v.mul_(0)), r"views must be rigid.*views\[0, 0\] is"),
    ],
    ids=["flat", "3x3", "empty", "nan", "scaled", "mirrored", "projective", "zero"],
)
def test_bad_views_are_named(views, message):
    with pytest.raises(InputError, match=message):
        Cameras.of(views)


@pytest.mark.parametrize(
    "intrinsics,message",
    [
        ((969.697, 969.697), "divided by the width"),
        ((0.0, 0.5), "focal lengths in 0..10"),
        ((float("nan"), 0.5), "focal lengths in 0..10"),
        ((0.5, 0.5, 0.5, 0.5), r"intrinsics must be \(fx, fy\), got 4 numbers"),
        (torch.eye(3).expand(1, 2, 3, 3), r"\[B=1, F=3, 3, 3\], got \[1, 2, 3, 3\]"),
        (torch.eye(4), r"got \[4, 4\]"),
        (torch.tensor([[0.5, 0.1, 0], [0, 0.5, 0], [0, 0, 1]]), r"intrinsics must be \[\[fx, 0, cx\]"),
        (torch.tensor([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 2]]), r"intrinsics must be \[\[fx, 0, cx\]"),
    ],
)
def test_bad_intrinsics_are_named(intrinsics, message):
    with pytest.raises(InputError, match=message):
        Cameras.of(parse_trajectory("w*2"), intrinsics)


def test_poses_with_quaternions():
    """A turn about y by 40 degrees, about x by 30, and none; a sign of the quaternion that changes nothing."""
    views = np.stack([parse_trajectory(text)[-1] for text in ("w*2,l*13", "d*3,i*10", "u*1")])
    angles = [(0, -39 / 2, 0), (-30 / 2, 0, 0), (0, 0, 0)]  # world to camera turns the other way
    poses = torch.zeros(3, 7, dtype=torch.float64)
    for pose, view, half in zip(poses, views, angles, strict=True):
        pose[:3] = torch.from_numpy(view[:3, 3])
        pose[3:6] = torch.tensor([math.sin(math.radians(a)) for a in half], dtype=torch.float64)
        pose[6] = math.cos(math.radians(sum(half)))
    assert np.allclose(views_from_poses(poses), views)
    poses[:, 3:] *= -1
    assert np.allclose(views_from_poses(poses), views)
    assert views_from_poses(poses.expand(2, 3, 7)).shape == (2, 3, 4, 4)
    with pytest.raises(InputError, match=r"poses must be \[..., 7\].*got \[3, 6\]"):
        views_from_poses(poses[:, :6])
    with pytest.raises(InputError, match="poses must have quaternions of length 1, got 0.0000 to 1.0000"):
        views_from_poses(torch.cat([poses, torch.zeros(1, 7)]))


@given(axis=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(x * x for x in q) > 0.01))
@settings(max_examples=40, deadline=None)
def test_every_quaternion_is_a_rotation_about_itself(axis):
    quaternion = torch.tensor(axis, dtype=torch.float64)
    quaternion = quaternion / quaternion.norm()
    view = views_from_poses(torch.cat([torch.zeros(3, dtype=torch.float64), quaternion]))
    Cameras.of(view[None])  # rigid
    assert np.allclose(view[:3, :3] @ quaternion[:3].numpy(), quaternion[:3], rtol=1e-5, atol=1e-9)


def test_options_of_a_command():
    assert parse_cameras(None, None) is None
    for option, focal in ((None, INTRINSICS["training"]), ("published-cli", (0.5, 0.5)), ("0.7,.9", (0.7, 0.9))):
        assert parse_cameras("w*3", option).focal[0, 3].tolist() == list(focal)
    with pytest.raises(InputError, match="--intrinsics needs a --trajectory"):
        parse_cameras(None, "training")
    with pytest.raises(InputError, match="--intrinsics must be training, published-cli or FX,FY as 0.5,0.9, got '1;2'"):
        parse_cameras("w*3", "1;2")
    with pytest.raises(InputError, match="divided by the width"):
        parse_cameras("w*3", "970,970")


def test_tensors_and_arrays_make_the_same_cameras():
    views = parse_trajectory("w*2,j*1")
    made = [Cameras.of(form) for form in (views, torch.from_numpy(views), views.tolist())]
    assert all(np.array_equal(one.views, made[0].views) and one.views.dtype == np.float64 for one in made)
    views[:] = 0
    assert not np.array_equal(made[0].views[0], views), "out of the caller's reach"
    assert np.array_equal(walk(["w"], torch.eye(4)), walk(["w"], EYE))


def test_cameras_need_no_torch():
    code = "import sys; import cfpp_rt.core.camera, cfpp_rt.core.rng; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
