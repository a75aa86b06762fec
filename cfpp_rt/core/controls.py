"""Checks of the arguments that every runtime of a student takes alike; needs no torch."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from cfpp_rt.core.camera import Cameras
from cfpp_rt.errors import InputError

# The actions of one block: frames_per_block of them for each row of the batch; empty for a model without actions.
Actions = tuple[tuple[int, ...], ...]
_BOOLS = (bool, np.bool_)


def check_latent_frames(latent_frames: int | None, given: int, frames_per_block: int) -> None:
    """Raise InputError unless `latent_frames` and the given ones among them make whole blocks and leave some to make.

    latent_frames: latent frames of the video, given ones included; None = without end. given: given latent frames.
    """
    n = frames_per_block
    if latent_frames is not None and (not isinstance(latent_frames, int) or latent_frames < 1 or latent_frames % n):
        raise InputError(f"latent_frames must be a multiple >= {n} of frames_per_block={n}, got {latent_frames}")
    if given % n or (latent_frames is not None and given >= latent_frames):
        raise InputError(
            f"initial_latents must hold a multiple of {n} latent frames and fewer than latent_frames={latent_frames},"
            f" got {given}"
        )


def check_latents_shape(name: str, shape: Sequence[int], batch: int, frame_shape: Sequence[int]) -> None:
    """Raise InputError unless `shape` is (batch, F, *frame_shape). frame_shape: (C, h, w)."""
    if len(shape) != 5 or shape[0] != batch or tuple(shape[2:]) != tuple(frame_shape):
        raise InputError(f"{name} must be [B={batch}, F, {', '.join(map(str, frame_shape))}], got {list(shape)}")


def check_camera_count(cameras: int, latent_frames: int | None) -> None:
    """Raise InputError unless there is one camera per latent frame, or a single one."""
    if latent_frames is not None and cameras not in (1, latent_frames):
        raise InputError(f"cameras must be one per latent frame, {latent_frames}, or a single one, got {cameras}")


def camera_rows(cameras: Any, batch: int) -> Cameras:
    """Return cameras for `batch` videos. Raises InputError for another type or number, and for what is not finite."""
    if not isinstance(cameras, Cameras):
        raise InputError(f"cameras must be made by Cameras.of, got {type(cameras).__name__}")
    if not (np.isfinite(cameras.views).all() and np.isfinite(cameras.focal).all()):
        raise InputError("cameras must be finite, got NaN or infinity")
    return cameras.rows(batch)


def no_actions(batch: int, frames_per_block: int, num_actions: int) -> Actions:
    """Return the actions that a rollout begins with: action 0 everywhere, or none for a model without actions."""
    return ((0,) * frames_per_block,) * batch if num_actions else ()


def action_rows(actions: Any, batch: int, frames_per_block: int, num_actions: int) -> Actions:
    """Return the actions of a block, row by row.

    actions: integers in 0..num_actions - 1, an array or tensor or sequence: one for all, [B], or [B, frames_per_block].
    Raises InputError for others, truth values and nested lists of unequal lengths among them, or for a model without
    actions.
    """
    n = frames_per_block
    if not num_actions:
        raise InputError(f"actions must not be given to a model without actions, got {actions}")
    try:
        given = np.array(actions.tolist() if hasattr(actions, "tolist") else actions, object)
        fits = (given.ndim < 2 and given.size in (1, batch)) or given.shape == (batch, n)
        # As objects: numpy would make an integer of the True in [2, True].
        fits = fits and all(not isinstance(a, _BOOLS) and 0 <= operator.index(a) < num_actions for a in given.flat)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, objects that are no integers, tensors without values
        fits = False
    if not fits:
        raise InputError(
            f"actions must be integers in 0..{num_actions - 1}: one, [B={batch}] or [B, {n}], got {actions}"
        )
    rows = given if given.ndim == 2 else np.broadcast_to(given.reshape(-1, 1), (batch, n))
    return tuple(tuple(operator.index(action) for action in row) for row in rows)
