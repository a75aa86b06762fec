"""The stages joined: prompt, image or video in, a stream of pictures out."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.config import ModelConfig, RolloutConfig, student
from cfpp_rt.core.camera import Cameras
from cfpp_rt.device.threads import largest_product, set_thread_count
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.model.weights import load_model
from cfpp_rt.runtime.cuda_graphs import Graphs
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.speed import fuse_gelu, has_fused_gelu, quantize_linears
from cfpp_rt.text import TextEncoder
from cfpp_rt.values import Conditioning, Frames


class Pipeline:
    """A model, its text encoder and its codec.

    model: the causal transformer. codec: turns latents into pixels and back (`WanVAE`, `TAEHV`).
    text_encoder: a `TextEncoder`, or the path it is loaded from when the first prompt comes (11 GB for umT5-XXL), or
    None where prompts are given as `Conditioning`. rollout: default settings of `stream`.

    On CUDA a stream's passes run as CUDA graphs where they can; `stream.rollout.why_not_graphs` tells where not. They
    are captured when the first stream of a setting is made, or by `warm_up`, and kept, with its KV cache, for the next
    one like it: `graphs.release()` lets go of them.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        codec: Codec,
        text_encoder: TextEncoder | str | Path | None = None,
        rollout: RolloutConfig | None = None,
        offload_text: bool = False,
    ):
        self.model = model
        self.codec = codec
        self.rollout = rollout or student("framewise-2step")
        self.graphs = Graphs(model) if model.device.type == "cuda" else None
        self.offload_text = offload_text
        self._text_encoder = text_encoder

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        base: str | Path | None = None,
        *,
        student_name: str = "framewise-2step",
        tiny_codec: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        config: ModelConfig | None = None,
        key: str | None = None,
        linear_dtype: str | None = None,
        offload_text: bool = False,
    ) -> "Pipeline":
        """Load a student.

        checkpoint: the transformer, anything `load_model` accepts. base: directory with text encoder, tokenizer and VAE
        (Wan2.1 or diffusers layout); default: `checkpoint`, if it is a directory. student_name: one of `STUDENTS`.
        tiny_codec: path of `taew2_1.pth` to decode with the tiny autoencoder: faster, approximate. The VAE runs in
        `dtype`, like the model. linear_dtype: "float8_e4m3" (GPU) or "int8" (CPU) computes the blocks' linear layers in
        8 bits, which is approximate: see `cfpp_rt.speed.quantize_linears`. offload_text: between prompts the text
        encoder (11 GB) lies in the host's memory, and each prompt pays for the way back. Raises CheckpointError or
        MissingExtraError with one line that says what to do.
        """
        rollout = student(student_name)
        if base is None:
            if not Path(checkpoint).is_dir():
                raise InputError(f"base must be the Wan2.1 directory, since checkpoint is a file: {checkpoint}")
            base = checkpoint
        codec = load_codec(base, tiny=tiny_codec, dtype=dtype, device=device)
        model = load_model(checkpoint, config=config, key=key, dtype=dtype, device=device)
        if model.device.type == "cpu" and has_fused_gelu(model.device, dtype):
            fuse_gelu(model)
        if linear_dtype is not None:
            quantize_linears(model, linear_dtype)
        return cls(model, codec, base, rollout, offload_text)

    def load_text_encoder(self) -> TextEncoder:
        """The text encoder, read from disk at the first call: float32 for a float32 model, else bfloat16."""
        if self._text_encoder is None:
            raise InputError("prompt must be given as Conditioning: this pipeline has no text encoder")
        if not isinstance(self._text_encoder, TextEncoder):
            self._text_encoder = TextEncoder.from_pretrained(
                self._text_encoder,
                dtype=torch.float32 if self.model.dtype == torch.float32 else torch.bfloat16,
                device=self.model.device,
                text_len=self.model.config.text_len,
            )
        return self._text_encoder

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to text embeddings [B, text_len, text_dim]."""
        encoder = self.load_text_encoder()
        encoder.to(self.model.device)
        text = encoder(list(prompts))
        if self.offload_text:
            encoder.to("cpu")
        return text

    def stream(
        self,
        prompt: str | Sequence[str] | Conditioning,
        *,
        frames: int | None = 81,
        size: tuple[int, int] = (480, 832),
        seed: int | Sequence[int] = 0,
        initial: Tensor | None = None,
        cameras: Cameras | None = None,
        rollout: RolloutConfig | None = None,
        noise: Tensor | None = None,
        renoise: Sequence[Tensor] | None = None,
        ahead: int = 0,
        graphs: bool = True,
    ) -> Stream:
        """Start a video; iterate over the result for its `Frames`, the first while later ones are still to be made.

        prompt: one text, several (one video each, made together), or text embeddings. frames: pictures in all,
        4 * n - 3 for n latent frames; None = without end (needs a window). size: (height, width), multiples of 16.
        initial: float pixels [1 or B, T, 3, height, width] in [-1, 1] with T = 4 * m - 3 that the video continues: one
        picture for image-to-video. cameras: for a model with the camera branch, one per latent frame or a single one.
        rollout: settings, default those of the student. cameras, seed, noise, renoise: see `Rollout`. ahead: blocks,
        0..8, that are under way while the caller still looks at the one before; no more pile up if the caller is
        slow. On CUDA a block is then decoded beside the passes of the next. Prompts, actions and cameras given
        meanwhile come that much later: 0 for interaction. graphs: False runs every pass from Python, on CUDA too.
        """
        if isinstance(prompt, str):
            prompt = [prompt]
        if not isinstance(prompt, Conditioning):
            if not prompt or not all(isinstance(text, str) for text in prompt):
                raise InputError(f"prompt must be a text, a list of texts or Conditioning, got {prompt!r}")
            self.load_text_encoder()  # once, and not part of the stream's times
        return Stream(
            model=self.model,
            codec=self.codec,
            encode_text=self.encode_text,
            prompt=prompt,
            config=rollout or self.rollout,
            frames=frames,
            size=size,
            initial=initial,
            cameras=cameras,
            seed=seed,
            noise=noise,
            renoise=renoise,
            ahead=ahead,
            graphs=self.graphs if graphs else None,
        )

    def warm_up(self, *, batch: int = 1, **options: Any) -> None:
        """Do beforehand what the first stream with these options would wait for: load kernels, capture CUDA graphs.

        Makes three blocks of a video without text and throws them away. options: of `stream`, for `batch` videos.
        """
        sizes = self.model.config
        text = Conditioning(torch.zeros(batch, sizes.text_len, sizes.text_dim))
        for _ in islice(self.stream(text, **options), 3):
            pass

    def generate(self, prompt: str | Sequence[str] | Conditioning, **options: Any) -> Frames:
        """The whole video at once: `stream` with its parts joined; needs a number of frames."""
        if options.get("frames", 81) is None:
            raise InputError("frames must be a number for generate, got None: use stream")
        parts: Iterator[Frames] = self.stream(prompt, **options)
        return Frames(torch.cat([part.pixels for part in parts], dim=1), 0)


def load_codec(base: str | Path, *, tiny: str | Path | None, dtype: torch.dtype, device: torch.device | str) -> Codec:
    """The Wan VAE of `base`, or the tiny autoencoder where its file is given."""
    if tiny is not None:
        from cfpp_rt.codec.taehv import TAEHV

        return TAEHV.from_pretrained(tiny, dtype=dtype, device=device)
    from cfpp_rt.codec.wan import WanVAE

    return WanVAE.from_pretrained(base, dtype=dtype, device=device)


def choose_threads(pipeline: Pipeline, rollout: RolloutConfig, size: tuple[int, int], batch: int = 1) -> None:
    """Set the number of torch's CPU threads for streams of a pipeline by the rule of `cfpp_rt.device.threads`.

    For the commands: a program that uses the package keeps its own setting. size: (height, width) in pixels. batch:
    videos made together. The codec and the text encoder are not counted.
    """
    config, (height, width) = pipeline.model.config, (side // pipeline.codec.spatial_factor for side in size)
    latent_frames = 2 * rollout.frames_per_block * batch  # a fused refresh has two blocks in a pass
    set_thread_count(largest_product(config, latent_frames * config.tokens_per_frame(height, width)))
