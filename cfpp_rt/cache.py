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
_MAX_RUNS = 3  # the sinks, the end of the ring and its beginning
_VALUE_HEADROOM = 16.0  # later values may be so many times larger than those of the first pass before they saturate


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Size of a KV cache before it is allocated.

    capacity: in latent frames. camera: with the keys and values of the camera branch, which doubles the size.
    """

    layers: int
    batch: int
    heads: int
    capacity: int
    tokens_per_frame: int
    head_dim: int
    camera: bool = False

    @property
    def elements_per_frame(self) -> int:
        """Number of elements of one frame slot: keys and values of all layers."""
        tensors = 4 if self.camera else 2
        return tensors * self.layers * self.batch * self.heads * self.tokens_per_frame * self.head_dim

    def bytes_per_frame(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> int:
        """Return the bytes of one frame slot over all layers.

        dtype: of the model. kv_dtype: of a float8 cache; its share of the one-layer dequantization buffer is included.
        """
        if kv_dtype is None:
            return self.elements_per_frame * dtype.itemsize
        return self.elements_per_frame * kv_dtype.itemsize + self.elements_per_frame // self.layers * dtype.itemsize

    def bytes(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> int:
        return self.bytes_per_frame(dtype, kv_dtype) * self.capacity

    @classmethod
    def of(
        cls, model: ModelConfig, batch: int, capacity: int, tokens_per_frame: int, *, camera: bool = False
    ) -> "CacheShape":
        return cls(model.num_layers, batch, model.num_heads, capacity, tokens_per_frame, model.head_dim, camera)


def _power_of_two_above(x: Tensor) -> Tensor:
    """Return the smallest power of two > x for float32 x >= 0, within 2^-126..2^126; 1 where x is 0 or not finite."""
    exponent = torch.frexp(x).exponent.clamp(-126, 126)
    power = ((exponent + 127) << 23).view(torch.float32)  # exact on every device, which exp2 is not
    return torch.where(x.isfinite(), power, 1.0)


class LayerCache:
    """One layer's part of a `KVCache`.

    keys, values: [B, H, capacity * T, D], in the dtype that they are stored in.
    scales: of a float8 cache: scales of the keys and of the values, float32 [B, H] each, powers of two; else empty.
    waits_for_scales: True until the first pass has set the scales.
    camera: the camera branch's part of this layer; None without one.
    """

    camera: "LayerCache | None" = None

    def __init__(self, data: Tensor, scales: Tensor | None, dequantized: Tensor | None):
        """Wrap the tensors of one layer.

        data: [2, B, H, capacity * T, D]. scales: [2, B, H]. dequantized: like data in the model's dtype, a buffer that
        all layers share.
        """
        self.keys, self.values = data.unbind(0)
        self.scales: tuple[Tensor, ...] = () if scales is None else tuple(scales.unbind(0))
        self.waits_for_scales = scales is not None
        self._dequantized = None if dequantized is None else (dequantized[0], dequantized[1])

    @property
    def dequantized_nbytes(self) -> int:
        """Bytes of the dequantization buffer that all layers share."""
        return 0 if self._dequantized is None else sum(tensor.nbytes for tensor in self._dequantized)

    def set_scales(self, k_norm: Tensor, values: Tensor) -> None:
        """Set the scales, once per rollout.

        k_norm: [H * D]. Weight of the keys' RMSNorm.
        values: [B, S, H * D]. Values of the first pass.

        A normalised channel is at most sqrt(H * D) times its weight, and rotation keeps the length of a pair, so keys
        never saturate. Values have no such bound: they saturate where they are more than 16 times as large as the
        largest value of their head in the first pass.
        """
        heads, head_dim = self.keys.shape[1], self.keys.shape[3]
        bound = k_norm.float().abs().unflatten(0, (heads, head_dim)).amax(1) * (heads * head_dim) ** 0.5
        largest = values.unflatten(2, (heads, head_dim)).abs().amax((1, 3)).float()
        self.scales[0].copy_(_power_of_two_above(bound / _FLOAT8_MAX))
        self.scales[1].copy_(_power_of_two_above(largest * (_VALUE_HEADROOM / _FLOAT8_MAX)))
        self.waits_for_scales = False

    def readable(self, ranges: TokenRanges) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, capacity * T, D] in the model's dtype.

        Of a float8 cache only the tokens in `ranges` are valid, and only until the next call on any layer.
        """
        if self._dequantized is None:
            return self.keys, self.values
        k_scale, v_scale = self.scales
        kv_dequantize_(*self._dequantized, self.keys, self.values, k_scale, v_scale, ranges)
        return self._dequantized


class KVCache:
    """Keys (after RoPE, at absolute frame positions) and values of every layer, allocated once.

    data: [L, 2, B, H, capacity * T, D] in the model's dtype. `keys(l)` and `values(l)` are its views
        [B, H, capacity * T, D]; `layers[l]` is what a layer of the model receives.
    camera_data: like data, for the camera branch and in the same slots; None without cameras.
    ring: which latent frame lies in which slot.

    With kv_dtype float8_e4m3fn the cache is approximate. `data` stores x / scale in 8 bits, 4 of them significant.
    What a layer is about to read is dequantized into a buffer in the model's dtype that all layers share. Keys and
    values have one scale each per layer, batch row and head. The relative error is at most 2^-4 whatever the scale, as
    long as numbers neither saturate nor fall below scale / 64. The scales that the first pass sets (see
    `LayerCache.set_scales`) therefore suffice while numbers stay in that range. They are powers of two, so that
    dequantization is exact.
    """

    def __init__(
        self,
        shape: CacheShape,
        ring: FrameRing,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_dtype: torch.dtype | None = None,
    ):
        """Allocate the memory; `KVCache.allocate` checks first whether it fits.

        dtype: of the model. kv_dtype: None = dtype, or torch.float8_e4m3fn.
        Raises InputError for another kv_dtype or a ring of another capacity, OutOfMemoryError if allocation fails.
        """
        if shape.capacity != ring.capacity:
            raise InputError(f"shape.capacity must be the ring's capacity {ring.capacity}, got {shape.capacity}")
        if kv_dtype not in (None, torch.float8_e4m3fn):
            raise InputError(f"kv_dtype must be None or torch.float8_e4m3fn, got {kv_dtype}")
        if shape.camera and kv_dtype is not None:  # as a camera moves away, its keys outgrow scales that are set once
            raise InputError(f"kv_dtype must be None for a rollout with cameras, got {kv_dtype}")
        self.ring = ring
        self.tokens_per_frame = shape.tokens_per_frame
        layer = (2, shape.batch, shape.heads, shape.capacity * shape.tokens_per_frame, shape.head_dim)
        scales = dequantized = None
        try:
            self.data = torch.empty((shape.layers, *layer), dtype=kv_dtype or dtype, device=device)
            self.camera_data = torch.empty_like(self.data) if shape.camera else None
            if kv_dtype is not None:
                dequantized = torch.empty(layer, dtype=dtype, device=device)
                scales = torch.ones(shape.layers, *layer[:3], device=device)
        except RuntimeError as error:
            wanted = shape.bytes(dtype, kv_dtype) / 2**30
            raise OutOfMemoryError(
                f"the KV cache of {shape.capacity} latent frames needs {wanted:.2f} GiB on {device}, which cannot be"
                " allocated: a smaller window, frame size or batch is needed"
            ) from error
        self.layers = [
            LayerCache(data, None if scales is None else scales[layer], dequantized)
            for layer, data in enumerate(self.data)
        ]
        if self.camera_data is not None:
            for layer_cache, data in zip(self.layers, self.camera_data, strict=True):
                layer_cache.camera = LayerCache(data, None, None)

    @classmethod
    def allocate(
        cls, shape: CacheShape, ring: FrameRing, dtype: torch.dtype, device: torch.device, config: RolloutConfig
    ) -> "KVCache":
        """Allocate the cache of a rollout. Raises OutOfMemoryError, if possible before anything is allocated."""
        require_cache_fits(shape, dtype, device, config)
        return cls(shape, ring, dtype, device, None if config.kv_dtype is None else KV_DTYPES[config.kv_dtype])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values and of a float8 cache's dequantization buffer; its scales are a few KiB more."""
        camera = 0 if self.camera_data is None else self.camera_data.nbytes
        return self.data.nbytes + camera + self.layers[0].dequantized_nbytes

    def rows(self, first: int, last: int) -> "KVCache":
        """Return rows [first, last) of the batch as a cache over the same memory, with an empty ring of its own.

        Raises InputError for a float8 cache and for one with cameras.
        """
        if self.layers[0].scales or self.camera_data is not None:
            raise InputError("rows: the cache must be neither float8 nor for cameras")
        part = copy.copy(self)
        part.ring = FrameRing(self.ring.sinks, self.ring.ring_slots, self.ring.frames_per_block)
        part.data = self.data[:, :, first:last]
        part.layers = [LayerCache(data, None, None) for data in part.data]
        return part

    def reuse(self, ring: FrameRing) -> None:
        """Begin another rollout in the same memory. ring: an empty one of the same capacity.

        Old keys stay until they are overwritten; the ring makes them invisible. The scales of a float8 cache are set
        anew by the first pass.
        """
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
        """Return the token ranges of the latent frames that each group of queries attends to.

        groups: visible latent frames of each group. Consecutive slots are merged into one range. The result is
        always padded to 3 ranges per group (sinks, end and start of the ring), so that one CUDA graph serves every
        latent frame.
        """
        t = self.tokens_per_frame
        runs = [[(first * t, last * t) for first, last in self.ring.runs(frames)] for frames in groups]
        _, _, batch, _, capacity_tokens, _ = self.data.shape
        return TokenRanges.of(
            runs, capacity_tokens=capacity_tokens, batch=batch, device=self.data.device, width=_MAX_RUNS
        )


# Room for the activations of one pass; with less, the run would fail later, with a worse message.
_HEADROOM_BYTES = 256 << 20


def available_bytes(device: torch.device) -> int | None:
    """Return the free memory of the device in bytes, or None where the system does not tell."""
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
    """Raise OutOfMemoryError, with the largest window that fits, if the cache does not fit in free memory."""
    available = available_bytes(device)
    per_frame = shape.bytes_per_frame(dtype, None if config.kv_dtype is None else KV_DTYPES[config.kv_dtype])
    wanted = per_frame * shape.capacity
    if available is None or wanted + _HEADROOM_BYTES <= available:
        return
    block, fits = config.frames_per_block, max(available - _HEADROOM_BYTES, 0) // per_frame
    spare = block if config.refresh == "fused" else 0
    window = fits // block * block - spare
    least = config.sinks + block
    remedy = (
        f"a window of {window} latent frames fits" if window >= least else "a smaller frame size or batch is needed"
    )
    raise OutOfMemoryError(
        f"the KV cache of {shape.capacity} latent frames x batch {shape.batch} needs {wanted / 2**30:.2f} GiB"
        f" on {device},"
        f" {available / 2**30:.2f} GiB are free: {remedy}"
    )


def empty_device_cache(device: torch.device) -> None:
    """Return freed memory that torch keeps in its allocator to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
