"""A student with its text encoder and codec: prompt, image or video in, a stream of frames out."""

import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.config import ModelConfig, RolloutConfig, rollout_preset
from cfpp_rt.core.camera import Cameras
from cfpp_rt.device.threads import largest_product, set_thread_count
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.model.weights import load_model
from cfpp_rt.runtime.cuda_graphs import CudaGraphCache
from cfpp_rt.runtime.stream import Stream, StreamRequest, require_prompt
from cfpp_rt.speed import fuse_gelu, has_fused_gelu, quantize_linears
from cfpp_rt.text import TextEncoder
from cfpp_rt.values import Frames


class Pipeline:
    """A model, its text encoder and its codec.

    model: the causal transformer.
    codec: converts between latents and pixels (`WanVAE`, `TAEHV`).
    text_encoder: a `TextEncoder`, or the path to load it from when the first prompt comes (11 GB for umT5-XXL), or None
        if only prompt_embeds will be given.
    config: default rollout settings of `stream`.
    offload_text: keep the text encoder in host memory between prompts; each prompt then pays for copying it back.

    On CUDA the passes of a stream run as CUDA graphs where possible; `stream.rollout.why_no_cuda_graphs` tells why not.
    They are captured when the first stream with its settings begins, or by `warm_up`, and kept with their KV cache for
    the next stream like it; `cuda_graphs.release()` frees them.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        codec: Codec,
        text_encoder: TextEncoder | str | Path | None = None,
        config: RolloutConfig | None = None,
        offload_text: bool = False,
    ):
        self.model = model
        self.codec = codec
        self.config = config or rollout_preset("framewise-2step")
        self.cuda_graphs = CudaGraphCache(model) if model.device.type == "cuda" else None
        self.offload_text = offload_text
        self._text_encoder = text_encoder
        self._text_lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        base: str | Path | None = None,
        *,
        preset: str = "framewise-2step",
        tiny_vae: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        model_config: ModelConfig | None = None,
        key: str | None = None,
        linear_dtype: str | None = None,
        offload_text: bool = False,
    ) -> "Pipeline":
        """Load a student.

        checkpoint: the transformer, anything that `load_model` accepts.
        base: directory with text encoder, tokenizer and VAE (Wan2.1 or diffusers layout); default: `checkpoint`, if it
            is a directory.
        preset: name of the student's rollout settings, one of `PRESETS`.
        tiny_vae: path of `taew2_1.pth`, to decode with the tiny autoencoder: faster, approximate.
        dtype: of model and VAE.
        model_config: sizes, where the checkpoint does not tell them.
        key: entry of a .pt container (default: generator_ema, else generator).
        linear_dtype: "float8_e4m3" (GPU) or "int8" (CPU) computes the blocks' linear layers in 8 bits, which is
            approximate: see `cfpp_rt.speed.quantize_linears`.
        offload_text: see `Pipeline`.

        Raises CheckpointError or MissingExtraError with one line that says what to do.
        """
        config = rollout_preset(preset)
        if base is None:
            if not Path(checkpoint).is_dir():
                raise InputError(f"base must be the Wan2.1 directory, since checkpoint is a file: {checkpoint}")
            base = checkpoint
        codec = load_codec(base, tiny_vae=tiny_vae, dtype=dtype, device=device)
        model = load_model(checkpoint, config=model_config, key=key, dtype=dtype, device=device)
        if model.device.type == "cpu" and has_fused_gelu(model.device, dtype):
            fuse_gelu(model)
        if linear_dtype is not None:
            quantize_linears(model, linear_dtype)
        return cls(model, codec, base, config, offload_text)

    def load_text_encoder(self) -> TextEncoder:
        """Return the text encoder, read from disk at the first call: float32 for a float32 model, else bfloat16."""
        if self._text_encoder is None:
            raise InputError("prompt_embeds must be given: this pipeline has no text encoder")
        with self._text_lock:  # it is read once, whichever thread comes first
            if not isinstance(self._text_encoder, TextEncoder):
                self._text_encoder = TextEncoder.from_pretrained(
                    self._text_encoder,
                    dtype=torch.float32 if self.model.dtype == torch.float32 else torch.bfloat16,
                    device=self.model.device,
                    text_len=self.model.config.text_len,
                )
            return self._text_encoder

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to prompt_embeds [B, text_len, text_dim]."""
        with self._text_lock:  # another thread must not move the encoder meanwhile
            encoder = self.load_text_encoder()
            encoder.to(self.model.device)
            prompt_embeds = encoder(list(prompts))
            if self.offload_text:
                encoder.to("cpu")
        return prompt_embeds

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        num_frames: int | None = 81,
        height: int = 480,
        width: int = 832,
        seed: int | Sequence[int] = 0,
        initial_frames: Tensor | None = None,
        cameras: Cameras | None = None,
        config: RolloutConfig | None = None,
        noise: Tensor | None = None,
        renoise: Sequence[Tensor] | None = None,
        ahead: int = 0,
        cuda_graphs: bool = True,
    ) -> Stream:
        """Start a video. Iterate over the result for its `Frames`; the first come before later ones are made.

        prompt: one text, or several, which makes one video each in one batch.
        prompt_embeds: text embeddings [B, text_len, text_dim] in place of a prompt.
        num_frames: frames in all, 1 + temporal_factor * (n - 1) for n latent frames in whole blocks (81 are 21 latent
            frames of Wan); None = without end, which needs a window.
        height, width: in pixels, multiples of 16.
        seed: see `Rollout`.
        initial_frames: float pixels [1 or B, T, 3, height, width] in [-1, 1] that the video continues, with
            T = 4 * m - 3: one frame for image-to-video.
        cameras: for a model with the camera branch, one per latent frame or a single one; see `Rollout`.
        config: rollout settings; default: those of the student.
        noise, renoise: see `Rollout`.
        ahead: number of blocks, 0..8, that are launched before the caller requests them. On CUDA a block is then
            decoded concurrently with the passes of the next. Prompts, actions and cameras that are set meanwhile take
            effect that many blocks later: use 0 for interaction.
        cuda_graphs: False launches every pass from Python, on CUDA too.
        """
        given = require_prompt(prompt, prompt_embeds)
        if not isinstance(given, Tensor):
            self.load_text_encoder()  # once, and not part of the stream's timings
        request = StreamRequest(
            prompt=given,
            config=config or self.config,
            num_frames=num_frames,
            height=height,
            width=width,
            seed=seed,
            initial_frames=initial_frames,
            cameras=cameras,
            noise=noise,
            renoise=renoise,
            ahead=ahead,
        )
        return Stream(
            request,
            model=self.model,
            codec=self.codec,
            encode_prompt=self.encode_prompt,
            cuda_graphs=self.cuda_graphs if cuda_graphs else None,
        )

    def warm_up(self, *, batch: int = 1, **options: Any) -> None:
        """Load kernels and capture CUDA graphs, so that the first stream with these options does not wait for them.

        Generates three blocks of a video without text and discards them. options: as for `stream`, for `batch` videos.
        """
        sizes = self.model.config
        prompt_embeds = torch.zeros(batch, sizes.text_len, sizes.text_dim)
        for _ in islice(self.stream(prompt_embeds=prompt_embeds, **options), 3):
            pass

    def generate(self, prompt: str | Sequence[str] | None = None, **options: Any) -> Frames:
        """Return all frames of a video at once. options: as for `stream`; num_frames must be a number."""
        if options.get("num_frames", 81) is None:
            raise InputError("num_frames must be a number for generate, got None: use stream")
        parts = [frames.pixels for frames in self.stream(prompt, **options)]
        return Frames(torch.cat(parts, dim=1), 0)


def load_codec(
    base: str | Path, *, tiny_vae: str | Path | None, dtype: torch.dtype, device: torch.device | str
) -> Codec:
    """Load the Wan VAE of the directory `base`, or the tiny autoencoder where its file is given."""
    if tiny_vae is not None:
        from cfpp_rt.codec.taehv import TAEHV

        return TAEHV.from_pretrained(tiny_vae, dtype=dtype, device=device)
    from cfpp_rt.codec.wan import WanVAE

    return WanVAE.from_pretrained(base, dtype=dtype, device=device)


def choose_threads(pipeline: Pipeline, config: RolloutConfig, size: tuple[int, int], batch: int = 1) -> None:
    """Set the number of torch's CPU threads for streams of a pipeline, with the rule in `cfpp_rt.device.threads`.

    Only the commands call this; a program that uses the package keeps its own setting.

    size: (height, width) in pixels. batch: videos in one batch. The codec and the text encoder are not counted.
    """
    sizes, (height, width) = pipeline.model.config, (side // pipeline.codec.spatial_factor for side in size)
    latent_frames = 2 * config.frames_per_block * batch  # a fused refresh has two blocks in a pass
    set_thread_count(largest_product(sizes, latent_frames * sizes.tokens_per_frame(height, width)))
