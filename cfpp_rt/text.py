"""The text encoder of Wan2.1: prompts to text embeddings by the umT5 encoder of transformers, `UMT5EncoderModel`."""

import html
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.config import MAX_LAYERS
from cfpp_rt.errors import CheckpointError, InputError, MissingExtraError
from cfpp_rt.io.checkpoint import read_sharded, read_tensors, require_exact

ORIGINAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
_PURPOSE = "the text encoder"
_TOKEN_CHARACTERS = 16  # of the longest tokens of umT5's vocabulary

# Names in the original file -> names in `UMT5EncoderModel`; each pattern matches an entire name.
_RENAMES = (
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)
# transformers stores the token embedding table under both names; a file has one or both.
_TOKEN_TABLES = ("shared.weight", "encoder.embed_tokens.weight")


def clean_text(text: str, text_len: int = 512) -> str:
    """Clean a prompt like the training captions: repair broken encoding, decode HTML entities, collapse whitespace.

    text_len: number of tokens that count. A text that is longer than so many of the longest tokens is cut first, since
        the time of the repair grows with the square of the length where entities are nested.

    Raises MissingExtraError without ftfy.
    """
    try:
        import ftfy
    except ImportError as error:
        raise MissingExtraError("ftfy", "wan", _PURPOSE) from error
    limit = _TOKEN_CHARACTERS * max(text_len, 512)
    if len(text) > limit:
        text = re.sub(r"([ \t\n])[ \t\n]+", r"\1", text)[:limit]
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: captions from the web are often escaped twice
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """The text encoder; called with prompts, it returns text embeddings.

    model: a `UMT5EncoderModel`, used in its own dtype on its own device, without gradients.
    tokenizer: the Hugging Face tokenizer of the model.
    text_len: number of token embeddings per prompt; longer prompts are truncated. >= 1.
    """

    def __init__(self, model: Any, tokenizer: Any, text_len: int = 512):
        if text_len < 1:
            raise InputError(f"text_len must be >= 1, got {text_len}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "right"
        self.text_len = text_len
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        text_len: int = 512,
    ) -> "TextEncoder":
        """Load encoder and tokenizer from local files.

        path: Wan2.1 directory (`models_t5_umt5-xxl-enc-bf16.pth`, `google/umt5-xxl/`) or a diffusers model directory
            (`text_encoder/`, `tokenizer/`).
        dtype, device: of the loaded weights.
        text_len: see `TextEncoder`.

        Raises CheckpointError for missing or wrong files, MissingExtraError without transformers or ftfy.
        """
        try:
            import ftfy  # noqa: F401  needed at the first prompt: fail before gigabytes are loaded
        except ImportError as error:
            raise MissingExtraError("ftfy", "wan", _PURPOSE) from error
        try:
            from transformers import UMT5Config, UMT5EncoderModel
        except ImportError as error:
            raise MissingExtraError("transformers", "wan", _PURPOSE) from error
        path = Path(path)
        if (path / ORIGINAL_FILE).exists():
            tokenizer = _load_tokenizer(path / ORIGINAL_TOKENIZER)
            source = path / ORIGINAL_FILE
            original = read_tensors(source)
            config = UMT5Config(**infer_config(original, source))
            state = to_transformers(original)
        elif (path / "text_encoder" / "config.json").exists():
            tokenizer = _load_tokenizer(path / "tokenizer")
            source = path / "text_encoder"
            try:
                config = UMT5Config.from_json_file(source / "config.json")
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"{source / 'config.json'}: {error}") from error
            if not isinstance(config.num_layers, int) or not 1 <= config.num_layers <= MAX_LAYERS:
                raise CheckpointError(
                    f"{source / 'config.json'}: num_layers must be in 1..{MAX_LAYERS}, got {config.num_layers}"
                )
            state = read_sharded(source, "model")
        else:
            raise CheckpointError(f"{path}: has neither {ORIGINAL_FILE} nor text_encoder/config.json")
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
        _assign(model, state, source, dtype, device)
        return cls(model, tokenizer, text_len)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.shared.weight.dtype

    def to(self, device: torch.device | str) -> None:
        """Move the model to a device, if it is not there already."""
        self.model.to(device)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids; embeddings of padding are not zero yet.

        ids: int64 [B, S].
        mask: integer [B, S], 1 for tokens, 0 for padding.

        Returns [B, S, text_dim] in the dtype of the encoder.
        """
        return self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to embeddings [B, text_len, text_dim] in the dtype of the encoder; padding is zero.

        Raises InputError unless prompts is a list of at least one string.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts must be a list of at least one string, got {prompts!r}")
        texts = [clean_text(prompt, self.text_len) for prompt in prompts]
        with self._lock:  # a tokenizer of Rust refuses a second thread
            tokens = self.tokenizer(
                texts,
                padding="max_length",
                truncation=True,
                max_length=self.text_len,
                add_special_tokens=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        # No token attends to padding, so only the length of the longest prompt is computed: most prompts are short.
        length = max(int(mask.sum(dim=1).max()), 1)
        prompt_embeds = self.encode_ids(ids[:, :length], mask[:, :length])
        prompt_embeds = prompt_embeds * mask[:, :length, None].to(prompt_embeds)
        return torch.nn.functional.pad(prompt_embeds, (0, 0, 0, self.text_len - length))


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from the names of the original file to those of `UMT5EncoderModel`; unknown names stay."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMES:
            match = re.fullmatch(pattern, name)
            if match:
                name = match.expand(replacement)
                break
        renamed[name] = tensor
    return renamed


def infer_config(state: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Return the arguments of `UMT5Config` that fit a state dict in the names of the original file.

    source: the file that an error names. Raises CheckpointError if the names are not those of a umT5 encoder.
    """
    try:
        buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        vocab, dim = state["token_embedding.weight"].shape
        dim_attn = state["blocks.0.attn.q.weight"].shape[0]
        dim_ffn = state["blocks.0.ffn.fc1.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"{source}: not a umT5 encoder: it has no {error.args[0]}") from error
    except (ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source}: not a umT5 encoder: {error}") from error
    layers = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "vocab_size": vocab,
        "d_model": dim,
        "d_kv": dim_attn // heads,
        "d_ff": dim_ffn,
        "num_heads": heads,
        "num_layers": len(layers),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def _assign(model: Any, state: dict[str, Tensor], source: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Assign the tensors to a model on the meta device, moving one at a time to avoid a second copy of 11 GB."""
    table = next((state[name] for name in _TOKEN_TABLES if name in state), None)
    if table is not None:
        state = {**state, **dict.fromkeys(_TOKEN_TABLES, table)}
    require_exact(state, {name: tensor.shape for name, tensor in model.state_dict().items()}, source)
    moved: dict[str, Tensor] = {}
    for name, tensor in state.items():
        moved[name] = moved[_TOKEN_TABLES[0]] if name == _TOKEN_TABLES[1] else tensor.to(device=device, dtype=dtype)
    model.load_state_dict(moved, assign=True)
    model.encoder.set_input_embeddings(model.shared)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, the tokenizer is needed")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise MissingExtraError("sentencepiece", "wan", "the tokenizer") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: no tokenizer could be read ({reason})") from error
