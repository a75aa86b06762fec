"""The KV cache: a ring of frame slots that is written in place and never shifted.

What a query may see is a list of token ranges, in any order, since attention does not care about the order of keys.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.errors import InputError, OutOfMemoryError
from cfpp_rt.ops.kv_dequantize import kv_dequantize_
from cfpp_rt.ops.token_ranges import TokenRanges
from cfpp_rt.values import KV_DTYPES

_FLOAT8_MAX = 448.0
_MOST_RUNS = 3  # the sinks, the end of the ring and its beginning
_VALUE_HEADROOM = 16.0  # how far later values may outgrow those of the first pass before they saturate


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Size of a KV cache before it is allocated.

    capacity: in latent frames. camera: with the keys and values of the camera branch, which are as many again.
    """

    layers: int
    batch: int
    heads: int
    capacity: int
    tokens_per_frame: int
    head_dim: int
    camera: bool = False

    @property
    def per_frame(self) -> int:
        """Elements of one frame slot: keys and values of all layers."""
        return (4 if self.camera else 2) * self.layers * self.batch * self.heads * self.tokens_per_frame * self.head_dim

    def bytes_per_frame(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> int:
        """Bytes of one frame slot over all layers; with kv_dtype, plus its share of the one-layer dequantization buffer."""
        if kv_dtype is None:
            return self.per_frame * dtype.itemsize
        return self.per_frame * kv_dtype.itemsize + self.per_frame // self.layers * dtype.itemsize

    def bytes(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> int:
        return self.bytes_per_frame(dtype, kv_dtype) * self.capacity

    @classmethod
    def of(
        cls, model: ModelConfig, batch: int, capacity: int, tokens_per_frame: int, *, camera: bool = False
    ) -> "CacheShape":
        return cls(model.num_layers, batch, model.num_heads, capacity, tokens_per_frame, model.head_dim, camera)


def _power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two > x, of float32 x >= 0, within 2^-126..2^126; 1 for 0 and for what is not finite."""
    exponent = torch.frexp(x).exponent.clamp(-126, 126)
    power = ((exponent + 127) << 23).view(torch.float32)  # exact on every device, which exp2 is not
    return torch.where(x.isfinite(), power, 1.0)


class LayerCache:
    """One layer's part of a KVCache. keys, values: [B, H, capacity * T, D], as they are stored.

    scales: empty, or for float8 those of keys and of values, float32 [B, H] each, powers of two. waits_for_scales: they
    are still to be set, by the first pass. camera: the camera branch's part of this layer, None without one.
    """

    camera: "LayerCache | None" = None

    def __init__(self, data: Tensor, scales: Tensor | None, wide: Tensor | None):
        """data: [2, B, H, capacity * T, D]; scales: [2, B, H]; wide: like data, room that all layers share."""
        self.keys, self.values = data.unbind(0)
        self.scales: tuple[Tensor, ...] = () if scales is None else tuple(scales.unbind(0))
        self.waits_for_scales = scales is not None
        self._wide = None if wide is None else (wide[0], wide[1])

    @property
    def wide_nbytes(self) -> int:
        return 0 if self._wide is None else sum(tensor.nbytes for tensor in self._wide)

    def set_scales(self, k_norm: Tensor, values: Tensor) -> None:
        """Fix the scales. k_norm: [H * D], weight of the keys' RMSNorm; values: [B, S, H * D] of the first pass.

        A normalised channel is at most sqrt(H * D) times its weight, and rotation keeps the length of a pair, so keys
        never saturate. Values have no such bound: they do where they outgrow the first ones of their head by 16.
        """
        heads, head_dim = self.keys.shape[1], self.keys.shape[3]
        bound = k_norm.float().abs().unflatten(0, (heads, head_dim)).amax(1) * (heads * head_dim) ** 0.5
        largest = values.unflatten(2, (heads, head_dim)).abs().amax((1, 3)).float()
        self.scales[0].copy_(_power_of_two_above(bound / _FLOAT8_MAX))
        self.scales[1].copy_(_power_of_two_above(largest * (_VALUE_HEADROOM / _FLOAT8_MAX)))
        self.waits_for_scales = False

    def readable(self, ranges: TokenRanges) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, capacity * T, D] in the model's dtype; float8: of the ranges, until the next call."""
        if self._wide is None:
            return self.keys, self.values
        k_scale, v_scale = self.scales
        kv_dequantize_(*self._wide, self.keys, self.values, k_scale, v_scale, ranges)
        return self._wide


class KVCache:
    """Keys (after RoPE, at absolute frame positions) and values of every layer, allocated once.

    data: [L, 2, B, H, capacity * T, D] in the model's dtype; `keys(l)` and `values(l)` are its views
    [B, H, capacity * T, D], and `layers[l]` is what a layer works with.

    kv_dtype float8_e4m3fn is the approximate form: data holds x / scale in 8 bits, 4 of them significant, and what a
    layer is about to read is widened into room for one layer in the model's dtype. There is one scale per layer, batch
    row and head, for keys and for values. The format being a floating one, its relative error of at most 2^-4 does not
    depend on the scale as long as numbers neither saturate nor fall below scale / 64; hence scales are set once (see
    `LayerCache.set_scales`), nothing is ever rescaled, and powers of two make widening exact.

    With shape.camera, `camera_data` is the same once more for the camera branch, in the same slots; else it is None.
    """

    def __init__(
        self,
        shape: CacheShape,
        ring: FrameRing,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_dtype: torch.dtype | None = None,
    ):
        """dtype: of the model. Raises InputError for a kv_dtype but None and float8_e4m3fn, or another capacity."""
        if shape.capacity != ring.capacity:
            raise InputError(f"shape.capacity must be the ring's capacity {ring.capacity}, got {shape.capacity}")
        if kv_dtype not in (None, torch.float8_e4m3fn):
            raise InputError(f"kv_dtype must be None or torch.float8_e4m3fn, got {kv_dtype}")
        if shape.camera and kv_dtype is not None:  # as the camera moves away, its keys outgrow scales that are set once
            raise InputError(f"kv_dtype must be None for a rollout with cameras, got {kv_dtype}")
        self.ring = ring
        self.tokens_per_frame = shape.tokens_per_frame
        layer = (2, shape.batch, shape.heads, shape.capacity * shape.tokens_per_frame, shape.head_dim)
        scales = wide = None
        try:
            self.data = torch.empty((shape.layers, *layer), dtype=kv_dtype or dtype, device=device)
            self.camera_data = torch.empty_like(self.data) if shape.camera else None
            if kv_dtype is not None:
                wide = torch.empty(layer, dtype=dtype, device=device)
                scales = torch.ones(shape.layers, *layer[:3], device=device)
        except RuntimeError as error:
            wanted = shape.bytes(dtype, kv_dtype) / 2**30
            raise OutOfMemoryError(
                f"the KV cache of {shape.capacity} frames needs {wanted:.2f} GiB on {device}, which cannot be allocated:"
                " a smaller window, picture or batch is needed"
            ) from error
        self.layers = [
            LayerCache(data, None if scales is None else scales[layer], wide) for layer, data in enumerate(self.data)
        ]
        if self.camera_data is not None:
            for of_layer, data in zip(self.layers, self.camera_data, strict=True):
                of_layer.camera = LayerCache(data, None, None)

    @property
    def nbytes(self) -> int:
        """Of all keys and values, and of the room for one layer that float8 has; scales are a few KiB."""
        camera = 0 if self.camera_data is None else self.camera_data.nbytes
        return self.data.nbytes + camera + self.layers[0].wide_nbytes

    def rows(self, first: int, last: int) -> "KVCache":
        """Rows [first, last) of the batch as a cache over the same memory, with a ring of its own that holds nothing.

        Not of a float8 cache or one for cameras.
        """
        if self.layers[0].scales or self.camera_data is not None:
            raise InputError("rows: the cache must be neither float8 nor for cameras")
        part = copy.copy(self)
        part.ring = FrameRing(self.ring.sinks, self.ring.ring, self.ring.block)
        part.data = self.data[:, :, first:last]
        part.layers = [LayerCache(data, None, None) for data in part.data]
        return part

    def reuse(self, ring: FrameRing) -> None:
        """Begin another rollout in the same memory; a ring of the same capacity."""
        if ring.capacity != self.ring.capacity:
            raise InputError(f"ring must have the capacity of the cache, {self.ring.capacity}, got {ring.capacity}")
        self.ring = ring
        for layer in self.layers:
            layer.waits_for_scales = bool(layer.scales)

    def keys(self, layer: int) -> Tensor:
        return self.data[layer, 0]

    def values(self, layer: int) -> Tensor:
        return self.data[layer, 1]

    def token_ranges(self, groups: list[list[int]]) -> TokenRanges:
        """Where the keys lie that each group of queries sees, given as latent frames: maximal runs of slots.

        Always as wide as sinks and a window that wraps around the ring need, so that one graph serves every frame.
        """
        t = self.tokens_per_frame
        runs = [[(first * t, last * t) for first, last in self.ring.runs(frames)] for frames in groups]
        _, _, batch, _, capacity, _ = self.data.shape
        return TokenRanges.of(runs, capacity=capacity, batch=batch, device=self.data.device, width=_MOST_RUNS)


# Activations of one pass, next to weights and cache; below this much the run would die later with a worse message.
_HEADROOM_BYTES = 256 << 20


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))  # of a container
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def require_cache_fits(shape: CacheShape, dtype: torch.dtype, device: torch.device, config: RolloutConfig) -> None:
    """Raise OutOfMemoryError, saying which window would fit, if the cache does not fit in free memory."""
    available = available_bytes(device)
    per_frame = shape.bytes_per_frame(dtype, None if config.kv_dtype is None else KV_DTYPES[config.kv_dtype])
    wanted = per_frame * shape.capacity
    if available is None or wanted + _HEADROOM_BYTES <= available:
        return
    block, fits = config.frames_per_block, max(available - _HEADROOM_BYTES, 0) // per_frame
    spare = block if config.refresh == "fused" else 0
    window = fits // block * block - spare
    least = config.sinks + block
    remedy = f"a window of {window} frames fits" if window >= least else "a smaller picture or batch is needed"
    raise OutOfMemoryError(
        f"the KV cache of {shape.capacity} frames x batch {shape.batch} needs {wanted / 2**30:.2f} GiB on {device},"
        f" {available / 2**30:.2f} GiB are free: {remedy}"
    )


def allocate(
    shape: CacheShape, ring: FrameRing, dtype: torch.dtype, device: torch.device, config: RolloutConfig
) -> KVCache:
    """The cache of a config. Raises OutOfMemoryError, if possible before anything is taken."""
    require_cache_fits(shape, dtype, device, config)
    return KVCache(shape, ring, dtype, device, None if config.kv_dtype is None else KV_DTYPES[config.kv_dtype])


def empty_device_cache(device: torch.device) -> None:
    """Return freed memory that torch keeps in its allocator to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
