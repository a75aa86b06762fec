"""Cameras for a runtime without torch: what `cfpp_rt.core.camera` makes of views and lenses, in numpy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.errors import InputError

Floats = NDArray[np.float64]
_RIGID = 1e-3  # as in `cfpp_rt.core.camera`


@dataclasses.dataclass(frozen=True)
class EngineCameras:
    """Where the camera stands at each of F latent frames, and its lens; made and checked by `EngineCameras.of`.

    views: world to camera, float64 [B, F, 4, 4]. focal: (fx, fy), float64 [B, F, 2].
    """

    views: Floats
    focal: Floats

    @classmethod
    def of(cls, views: Any, focal: Any, batch: int = 1) -> "EngineCameras":
        """views: [F, 4, 4], [1, F, 4, 4] or [B, F, 4, 4], rigid, in any world. focal: (fx, fy), or one of every frame
        as [1 or B, F, 2]: focal lengths by width and height of the picture.

        A `cfpp_rt.Cameras` has both by these names: `EngineCameras.of(cameras.views, cameras.focal)`. Raises InputError
        for other shapes, and for what is not finite, not rigid or no focal length.
        """
        views = np.asarray(views, np.float64)
        views = views[None] if views.ndim == 3 else views
        if views.ndim != 4 or views.shape[0] not in (1, batch) or views.shape[2:] != (4, 4) or not views.size:
            raise InputError(f"views must be [F, 4, 4] or [B={batch}, F, 4, 4], with F > 0, got {list(views.shape)}")
        focal, shape = np.asarray(focal, np.float64), (batch, views.shape[1], 2)
        if focal.shape not in ((2,), (1, *shape[1:]), shape) or not (np.isfinite(focal) & (focal > 0)).all():
            raise InputError(f"focal must be (fx, fy) or {list(shape)}, finite and > 0, got {list(focal.shape)}")
        turned = views[..., :3, :3]
        off = np.abs(turned @ turned.swapaxes(-1, -2) - np.eye(3)).max(initial=0.0)
        bottom = np.abs(views[..., 3, :] - (0, 0, 0, 1)).max(initial=0.0)
        if not (off <= _RIGID and bottom <= _RIGID and (np.linalg.det(turned) > 0).all()):  # NaN is neither
            raise InputError("views must be finite and rigid, a rotation and a translation over (0, 0, 0, 1)")
        return cls(np.broadcast_to(views, (batch, *views.shape[1:])), np.broadcast_to(focal, shape))

    def __len__(self) -> int:
        """Number of frames F."""
        return int(self.views.shape[1])

    def projections(self, frames: Sequence[int], world: Floats) -> NDArray[np.float32]:
        """P = K V and P^-1 of n frames, [B, n, 2, 4, 4], views [B, 1, 4, 4] of `world` being the identity."""
        seen = self.views[:, frames] @ _inverse(world)
        lens = np.concatenate([self.focal[:, frames], np.ones((*self.focal[:, frames].shape[:2], 2))], axis=2)
        both = lens[..., :, None] * seen, _inverse(seen) / lens[..., None, :]
        return np.stack(both, axis=2).astype(np.float32)


def _inverse(views: Floats) -> Floats:
    """Of rigid matrices [..., 4, 4]."""
    rotation = views[..., :3, :3].swapaxes(-1, -2)
    top = np.concatenate([rotation, -rotation @ views[..., :3, 3:]], axis=-1)
    return np.concatenate([top, views[..., 3:, :]], axis=-2)
