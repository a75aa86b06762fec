"""Cameras: a pose and a lens per latent frame, their matrices, and trajectories from text. Needs numpy alone.

A model with the camera branch (minWM's, `ModelConfig.camera`) sees a frame through P = K V, with V the rigid 4 x 4 view
matrix (world to camera) and K = diag(fx, fy, 1, 1): projective positional encoding (PRoPE, Li et al. 2025, arXiv
2507.10496). Only P of one frame times P^-1 of another reaches the result, so the choice of the world does not matter.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.errors import InputError

Floats = NDArray[np.float64]

# Focal lengths (fx / width, fy / height). The public models were trained with the first, hence the default; their
# command line runs them with the second: 90 degrees of view from top to bottom, where they have seen 58.
INTRINSICS = {"training": (969.697 / 1920, 969.697 / 1080), "published-cli": (0.5, 0.5)}

_MAX_FOCAL = 10.0  # 6 degrees of view; greater values are pixels that were not divided by the frame size
_RIGID = 1e-3  # how far a rotation may be from orthogonal: float32 with room, but not what bfloat16 leaves of one
_STEP = 0.08
_TURN = math.radians(3)

# Key of one latent frame -> yaw, pitch, and the step along x (right), y (down), z (forward) of the turned camera.
_KEYS: dict[str, tuple[float, float, tuple[float, float, float]]] = {
    "w": (0, 0, (0, 0, _STEP)),
    "s": (0, 0, (0, 0, -_STEP)),
    "a": (0, 0, (-_STEP, 0, 0)),
    "d": (0, 0, (_STEP, 0, 0)),
    "u": (0, 0, (0, -_STEP, 0)),
    "dn": (0, 0, (0, _STEP, 0)),
    "j": (-_TURN, 0, (0, 0, 0)),
    "l": (_TURN, 0, (0, 0, 0)),
    "i": (0, _TURN, (0, 0, 0)),
    "k": (0, -_TURN, (0, 0, 0)),
}
_MAX_UNITS = 100_000


@dataclasses.dataclass(frozen=True)
class Cameras:
    """The pose and the lens of the camera at each of F latent frames; made and checked by `Cameras.of`.

    views: float64 [B, F, 4, 4], world to camera.
    focal: float64 [B, F, 2], (fx, fy) divided by the width and height of the frame.
    """

    views: Floats
    focal: Floats

    @classmethod
    def of(cls, views: Any, intrinsics: Any = INTRINSICS["training"]) -> "Cameras":
        """Return checked cameras. Both arguments may be numpy arrays, torch tensors or nested numbers; they are copied.

        views: [F, 4, 4] for one video or [B, F, 4, 4], rigid, world to camera. Camera axes as in OpenCV: x right,
            y down, z forward.
        intrinsics: (fx, fy) of all frames, or matrices [3, 3] or [B, F, 3, 3], normalised: fx by the width, fy by the
            height of the frame. The principal point is ignored: training put it at 0.

        Raises InputError for other shapes, for what is not finite or not rigid, and for focal lengths out of 0..10.
        """
        views = _to_array(views)
        if views.ndim == 3:
            views = views[None]
        if views.ndim != 4 or views.shape[2:] != (4, 4) or 0 in views.shape:
            raise InputError(f"views must be [B, F, 4, 4] or [F, 4, 4], none of them 0, got {list(views.shape)}")
        if not np.isfinite(views).all():
            raise InputError("views must be finite, got NaN or infinity")
        rotation = views[..., :3, :3]
        skew = np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(3)).max(axis=(2, 3))
        bottom = np.abs(views[..., 3, :] - (0, 0, 0, 1)).max(axis=2)
        wrong = (skew > _RIGID) | (bottom > _RIGID) | (np.linalg.det(rotation) < 0)
        if wrong.any():
            row, frame = np.argwhere(wrong)[0].tolist()
            raise InputError(
                f"views must be rigid, a rotation and a translation over (0, 0, 0, 1): views[{row}, {frame}] is"
                f" {views[row, frame].round(4).tolist()}"
            )
        return cls(views, _focal(intrinsics, views.shape[0], views.shape[1]))

    def __len__(self) -> int:
        """Return the number of latent frames F."""
        return self.views.shape[1]

    def rows(self, batch: int) -> "Cameras":
        """Return these cameras for `batch` videos, repeating those of a single video.

        Raises InputError for any other number of videos.
        """
        if len(self.views) not in (1, batch):
            raise InputError(f"cameras must be of 1 video or of {batch}, got {len(self.views)}")
        views, focal = self.views, self.focal
        return Cameras(
            np.broadcast_to(views, (batch, *views.shape[1:])), np.broadcast_to(focal, (batch, *focal.shape[1:]))
        )

    def at(self, frames: Sequence[int]) -> "Cameras":
        """Return the cameras at the given latent frames."""
        return Cameras(self.views[:, frames], self.focal[:, frames])

    def in_world_of(self, first: Floats) -> "Cameras":
        """Return the same cameras in the world where `first`, views [B, 1, 4, 4], is the identity.

        The numbers are smaller there, so less is lost when P is rounded to float32.
        """
        return Cameras(self.views @ invert(first), self.focal)

    def from_first(self) -> "Cameras":
        """Return the same cameras in the world of the first frame's camera."""
        return self.in_world_of(self.views[:, :1])

    def matrices(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return P = K V and P^-1 = V^-1 K^-1, float32 [B, F, 4, 4] each, computed in float64."""
        lens = np.concatenate([self.focal, np.ones_like(self.focal)], axis=2)
        matrices, inverses = lens[..., :, None] * self.views, invert(self.views) / lens[..., None, :]
        return matrices.astype(np.float32), inverses.astype(np.float32)


class CameraPath:
    """The cameras of a video, latent frame by latent frame, in the world of the video's first camera.

    The path given last is followed, from the latent frame that is requested next. Where it ends, its last camera stands
    still. One thread may call `follow` while another calls `cameras`.
    """

    def __init__(self, cameras: Cameras):
        """cameras: the path from latent frame 0 on."""
        self._world = cameras.views[:, :1]
        self._cameras, self._start, self._given = cameras, 0, cameras

    def follow(self, cameras: Cameras) -> None:
        """Replace the path from the latent frame on that `cameras` is called for next."""
        self._given = cameras

    def cameras(self, start: int, frames: int) -> Cameras:
        """Return the cameras of `frames` latent frames beginning at `start`; called once per block."""
        given = self._given  # read once: another thread may replace it meanwhile
        if given is not self._cameras:
            self._cameras, self._start = given, start
        last = len(self._cameras) - 1
        own = self._cameras.at([min(frame - self._start, last) for frame in range(start, start + frames)])
        return own.in_world_of(self._world)


def invert(views: Floats) -> Floats:
    """Return the inverse of rigid matrices [..., 4, 4]: world to camera becomes camera to world, and back."""
    rotation = views[..., :3, :3].swapaxes(-1, -2)
    top = np.concatenate([rotation, -rotation @ views[..., :3, 3:]], axis=-1)
    return np.concatenate([top, views[..., 3:, :]], axis=-2)


def views_from_poses(poses: Any) -> Floats:
    """Return views float64 [..., 4, 4] of poses [..., 7]: a translation, then a quaternion x, y, z, w, world to camera.

    minWM's data sets store cameras so. Quaternions are normalised; InputError for one whose length is not near 1.
    """
    poses = _to_array(poses)
    if poses.shape[-1:] != (7,):
        raise InputError(f"poses must be [..., 7], a translation and a quaternion, got {list(poses.shape)}")
    translation, quaternion = poses[..., :3], poses[..., 3:]
    length = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if not (np.abs(length - 1) <= _RIGID).all():
        raise InputError(f"poses must have quaternions of length 1, got {length.min():.4f} to {length.max():.4f}")
    x, y, z, w = np.moveaxis(quaternion / length, -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    views = np.tile(np.eye(4), (*poses.shape[:-1], 1, 1))
    views[..., :3, :3] = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    views[..., :3, 3] = translation
    return views


def walk(keys: Sequence[str], view: Any) -> Floats:
    """Return the view after each of the keys, one per latent frame: float64 [len(keys), 4, 4].

    keys: w, s forward and back, a, d left and right, u, dn up and down, by 0.08 each; j, l turn left and right, i, k up
        and down, by 3 degrees each. Every key moves the camera as it then stands.
    view: [4, 4], world to camera. The pose that the walk begins from.

    Raises InputError for another key.
    """
    camera = invert(_to_array(view))
    made = []
    for key in keys:
        if key not in _KEYS:
            raise InputError(f"key must be one of {' '.join(_KEYS)}, got {key!r}")
        camera = camera @ _motion(*_KEYS[key])
        made.append(camera)
    return invert(np.stack(made)) if made else np.empty((0, 4, 4))


def parse_trajectory(text: str) -> Floats:
    """Return the views of a trajectory such as "w*10,j*5,w*4": float64 [N + 1, 4, 4] for N units, the identity first.

    A unit is one latent frame; the keys are those of `walk`, one per unit, at most 100,000 in all. Raises InputError
    naming the part.
    """
    keys: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*\*\s*([0-9]{1,6})\s*", part)
        key, count = (match[1], int(match[2])) if match else ("", 0)
        if key not in _KEYS or not 1 <= count <= _MAX_UNITS:
            raise InputError(
                f"trajectory must be parts KEY*COUNT joined by commas, KEY one of {' '.join(_KEYS)} (one per part) and"
                f" COUNT in 1..{_MAX_UNITS}, as w*10,j*5: got the part {part.strip()!r}"
            )
        if len(keys) + count > _MAX_UNITS:
            raise InputError(f"trajectory must be at most {_MAX_UNITS} units in all, got {len(keys) + count} or more")
        keys += [key] * count
    return np.concatenate([np.eye(4)[None], walk(keys, np.eye(4))])


def parse_cameras(trajectory: str | None, intrinsics: str | None) -> Cameras | None:
    """Return the cameras of a command's options `--trajectory` and `--intrinsics`; None without a trajectory.

    intrinsics: a name of `INTRINSICS`, or FX,FY.
    """
    if trajectory is None:
        if intrinsics is not None:
            raise InputError("--intrinsics needs a --trajectory, got none")
        return None
    name = "training" if intrinsics is None else intrinsics
    if name in INTRINSICS:
        return Cameras.of(parse_trajectory(trajectory), INTRINSICS[name])
    number = r"([0-9]*\.?[0-9]+)"
    match = re.fullmatch(f"{number},{number}", name)
    if match is None:
        raise InputError(f"--intrinsics must be {', '.join(INTRINSICS)} or FX,FY as 0.5,0.9, got {name!r}")
    return Cameras.of(parse_trajectory(trajectory), (float(match[1]), float(match[2])))


def _to_array(values: Any) -> Floats:
    """Return a float64 copy of a numpy array, a torch tensor on any device, or nested numbers."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.array(values, np.float64)


def _focal(intrinsics: Any, batch: int, frames: int) -> Floats:
    """Return (fx, fy) of every frame, float64 [B, F, 2]."""
    k = _to_array(intrinsics)
    if k.ndim == 1:
        if len(k) != 2:
            raise InputError(f"intrinsics must be (fx, fy), got {len(k)} numbers")
        focal = k
    else:
        if k.shape not in ((3, 3), (batch, frames, 3, 3)):
            raise InputError(
                f"intrinsics must be (fx, fy), [3, 3] or [B={batch}, F={frames}, 3, 3], got {list(k.shape)}"
            )
        if k[..., 0, 1].any() or k[..., 1, 0].any() or not (k[..., 2, :] == (0, 0, 1)).all():
            raise InputError("intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in every frame, got others")
        focal = np.stack([k[..., 0, 0], k[..., 1, 1]], axis=-1)
    if not ((focal > 0) & (focal <= _MAX_FOCAL)).all():  # False for NaN
        raise InputError(
            f"intrinsics must be focal lengths in 0..{_MAX_FOCAL:g}, those in pixels divided by the width (fx) and"
            f" height (fy) of the frame, got {focal.reshape(-1, 2)[0].tolist()} and {focal.size // 2 - 1} more"
        )
    return np.broadcast_to(focal, (batch, frames, 2))


def _motion(yaw: float, pitch: float, step: tuple[float, float, float]) -> Floats:
    """Return camera to world after a turn about y (positive: right), one about x (positive: up), and a step."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    about_y = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    cos, sin = math.cos(pitch), math.sin(pitch)
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    motion = np.eye(4)
    motion[:3, :3] = about_y @ about_x
    motion[:3, 3] = motion[:3, :3] @ step
    return motion
