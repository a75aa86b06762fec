"""Cameras: a pose and a lens per latent frame, the matrices that attention takes of them, trajectories from text.

A model with the camera branch (minWM's, `ModelConfig.camera`) sees a frame through P = K V, with V the rigid 4 x 4 view
matrix (world to camera) and K = diag(fx, fy, 1, 1): projective positional encoding (PRoPE, Li et al. 2025, arXiv
2507.10496). Only P of one frame times P^-1 of another reaches the result, so any world will do.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from cfpp_rt.device.transfer import to_device
from cfpp_rt.errors import InputError

# Focal lengths (fx / width, fy / height). The public models were trained with the first, hence the default; their
# command line runs them with the second: 90 degrees of view from top to bottom, where they have seen 58.
INTRINSICS = {"training": (969.697 / 1920, 969.697 / 1080), "published-cli": (0.5, 0.5)}

_LONGEST_FOCAL = 10.0  # 6 degrees of view; beyond it, focal lengths are pixels that were not normalised
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
_MOST_UNITS = 100_000


@dataclasses.dataclass(frozen=True)
class Projections:
    """P of every frame and its inverse, float32 [B, F, 4, 4] each."""

    matrices: Tensor
    inverses: Tensor

    @classmethod
    def cat(cls, parts: "Sequence[Projections]") -> "Projections":
        """The frames of one after those of the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([p.matrices for p in parts], dim=1), torch.cat([p.inverses for p in parts], dim=1))

    def of_frames(self, first: int, end: int) -> "Projections":
        return Projections(self.matrices[:, first:end], self.inverses[:, first:end])


@dataclasses.dataclass(frozen=True)
class Cameras:
    """Where the camera stands at each of F latent frames, and its lens; made and checked by `Cameras.of`.

    views: world to camera, float64 [B, F, 4, 4] on the CPU. focal: (fx, fy), float64 [B, F, 2].
    """

    views: Tensor
    focal: Tensor

    @classmethod
    def of(cls, views: Tensor, intrinsics: Tensor | tuple[float, float] = INTRINSICS["training"]) -> "Cameras":
        """views: [F, 4, 4] for one video or [B, F, 4, 4], rigid, world to camera; camera axes as in OpenCV: x right,
        y down, z forward. intrinsics: (fx, fy) of all frames, or matrices [3, 3] or [B, F, 3, 3], normalised: fx by the
        width, fy by the height of the picture. The principal point is not looked at: training put it at 0.

        Raises InputError for other shapes, for what is not finite or not rigid, and for focal lengths out of 0..10.
        """
        if views.ndim == 3:
            views = views[None]
        if views.ndim != 4 or views.shape[2:] != (4, 4) or 0 in views.shape:
            raise InputError(f"views must be [B, F, 4, 4] or [F, 4, 4], none of them 0, got {list(views.shape)}")
        views = views.detach().to("cpu", torch.float64, copy=True)  # out of the caller's reach
        if not bool(views.isfinite().all()):
            raise InputError("views must be finite, got NaN or infinity")
        rotation = views[..., :3, :3]
        off = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax((2, 3))
        bottom = (views[..., 3, :] - torch.tensor([0.0, 0, 0, 1])).abs().amax(2)
        if bool((wrong := (off > _RIGID) | (bottom > _RIGID) | (torch.linalg.det(rotation) < 0)).any()):
            row, frame = wrong.nonzero()[0].tolist()
            raise InputError(
                f"views must be rigid, a rotation and a translation over (0, 0, 0, 1): views[{row}, {frame}] is"
                f" {[[round(x, 4) for x in line] for line in views[row, frame].tolist()]}"
            )
        return cls(views, _focal(intrinsics, views.shape[0], views.shape[1]))

    def __len__(self) -> int:
        """Number of frames F."""
        return self.views.shape[1]

    def rows(self, batch: int) -> "Cameras":
        """The same for `batch` videos, where there is one. Raises InputError for any other number."""
        if len(self.views) not in (1, batch):
            raise InputError(f"cameras must be of 1 video or of {batch}, got {len(self.views)}")
        return Cameras(self.views.expand(batch, -1, -1, -1), self.focal.expand(batch, -1, -1))

    def at(self, frames: Sequence[int]) -> "Cameras":
        """Those of the given frames."""
        return Cameras(self.views[:, frames], self.focal[:, frames])

    def in_world_of(self, first: Tensor) -> "Cameras":
        """The same in a world where `first`, views [B, 1, 4, 4], is the identity: smaller numbers round less."""
        return Cameras(self.views @ invert(first), self.focal)

    def from_first(self) -> "Cameras":
        """The same in the world of the first frame's camera."""
        return self.in_world_of(self.views[:, :1])

    def projections(self, device: torch.device | str = "cpu") -> Projections:
        """P = K V and P^-1 = V^-1 K^-1, made in float64."""
        lens = torch.cat([self.focal, torch.ones_like(self.focal)], dim=2)
        matrices, inverses = lens[..., :, None] * self.views, invert(self.views) / lens[..., None, :]
        return Projections(to_device(matrices.float(), device), to_device(inverses.float(), device))


class CameraPath:
    """Where the cameras of a video stand, frame by frame: those given last, the last of which then stands still.

    All are seen from the world of the video's first camera.
    """

    def __init__(self, cameras: Cameras):
        """cameras: of frame 0 and on."""
        self._world = cameras.views[:, :1]
        self.follow(cameras, 0)

    def follow(self, cameras: Cameras, start: int) -> None:
        """From latent frame `start` on."""
        self._cameras, self._start = cameras, start

    def projections(self, start: int, frames: int, device: torch.device) -> Projections:
        """Of latent frames `start` and on."""
        last = len(self._cameras) - 1
        own = self._cameras.at([min(frame - self._start, last) for frame in range(start, start + frames)])
        return own.in_world_of(self._world).projections(device)


def invert(views: Tensor) -> Tensor:
    """The inverse of rigid matrices [..., 4, 4]: world to camera becomes camera to world, and back."""
    rotation = views[..., :3, :3].mT
    top = torch.cat([rotation, -rotation @ views[..., :3, 3:]], dim=-1)
    return torch.cat([top, views[..., 3:, :]], dim=-2)


def views_from_poses(poses: Tensor) -> Tensor:
    """Views float64 [..., 4, 4] of poses [..., 7]: translation, then quaternion x, y, z, w, both world to camera.

    This is how minWM's data sets hold cameras. Quaternions are normalised; InputError for one that is not near 1.
    """
    if poses.shape[-1:] != (7,):
        raise InputError(f"poses must be [..., 7], a translation and a quaternion, got {list(poses.shape)}")
    translation, quaternion = poses.detach().to("cpu", torch.float64).split([3, 4], dim=-1)
    length = quaternion.norm(dim=-1, keepdim=True)
    if not bool(((length - 1).abs() <= _RIGID).all()):
        raise InputError(f"poses must have quaternions of length 1, got {length.min():.4f} to {length.max():.4f}")
    x, y, z, w = (quaternion / length).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    views = torch.eye(4, dtype=torch.float64).repeat(*poses.shape[:-1], 1, 1)
    views[..., :3, :3] = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    views[..., :3, 3] = translation
    return views


def _focal(intrinsics: Tensor | tuple[float, float], batch: int, frames: int) -> Tensor:
    """(fx, fy) of every frame, float64 [B, F, 2]."""
    if isinstance(intrinsics, Tensor):
        if intrinsics.shape not in ((3, 3), (batch, frames, 3, 3)):
            raise InputError(
                f"intrinsics must be (fx, fy), [3, 3] or [B={batch}, F={frames}, 3, 3], got {list(intrinsics.shape)}"
            )
        k = intrinsics.detach().to("cpu", torch.float64)
        if bool(k[..., 0, 1].any()) or bool(k[..., 1, 0].any()) or not bool((k[..., 2, :] == torch.eye(3)[2]).all()):
            raise InputError("intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in every frame, got others")
        focal = torch.stack([k[..., 0, 0], k[..., 1, 1]], dim=-1)
    else:
        if len(intrinsics) != 2:
            raise InputError(f"intrinsics must be (fx, fy), got {len(intrinsics)} numbers")
        focal = torch.tensor([float(f) for f in intrinsics], dtype=torch.float64)
    if not bool(((focal > 0) & (focal <= _LONGEST_FOCAL)).all()):  # NaN is neither
        raise InputError(
            f"intrinsics must be focal lengths in 0..{_LONGEST_FOCAL:g}, those in pixels divided by the width (fx) and"
            f" height (fy) of the picture, got {focal.reshape(-1, 2)[0].tolist()} and {focal.numel() // 2 - 1} more"
        )
    return focal.expand(batch, frames, 2)


def walk(keys: Sequence[str], view: Tensor) -> Tensor:
    """Views after each of the keys, one per latent frame, from where the camera stands: [len(keys), 4, 4] float64.

    view: [4, 4], world to camera. keys: w, s forward and back, a, d left and right, u, dn up and down, by 0.08 each;
    j, l turn left and right, i, k up and down, by 3 degrees each. Every key moves the camera as it then stands.
    Raises InputError for another key.
    """
    camera = invert(view.to("cpu", torch.float64))
    made = []
    for key in keys:
        if key not in _KEYS:
            raise InputError(f"key must be one of {' '.join(_KEYS)}, got {key!r}")
        yaw, pitch, step = _KEYS[key]
        camera = camera @ _motion(yaw, pitch, step)
        made.append(camera)
    return invert(torch.stack(made)) if made else torch.empty(0, 4, 4, dtype=torch.float64)


def _motion(yaw: float, pitch: float, step: tuple[float, float, float]) -> Tensor:
    """Camera to world after a turn about y (right is positive), then about x (up), then a step along the new axes."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    about_y = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=torch.float64)
    cos, sin = math.cos(pitch), math.sin(pitch)
    about_x = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], dtype=torch.float64)
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3] = about_y @ about_x
    motion[:3, 3] = motion[:3, :3] @ torch.tensor(step, dtype=torch.float64)
    return motion


def parse_trajectory(text: str) -> Tensor:
    """Views of a trajectory such as "w*10,j*5,w*4": [N + 1, 4, 4] float64 for N units, the first the identity.

    A unit is one latent frame; the keys are those of `walk`, one per unit. Raises InputError naming the part.
    """
    keys: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*\*\s*([0-9]{1,6})\s*", part)
        key, count = (match[1], int(match[2])) if match else ("", 0)
        if key not in _KEYS or not 1 <= count <= _MOST_UNITS:
            raise InputError(
                f"trajectory must be parts KEY*COUNT joined by commas, KEY one of {' '.join(_KEYS)} (one per part) and"
                f" COUNT in 1..{_MOST_UNITS}, as w*10,j*5: got the part {part.strip()!r}"
            )
        keys += [key] * count
    start = torch.eye(4, dtype=torch.float64)
    return torch.cat([start[None], walk(keys, start)])


def parse_cameras(trajectory: str | None, intrinsics: str | None) -> Cameras | None:
    """The cameras of a command's two options: a trajectory, and a name of `INTRINSICS` or FX,FY. None without one."""
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
