import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfpp_rt.bench.latency.workload import NoDecoder
from cfpp_rt.errors import CheckpointError, InputError, MissingExtraError
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.text import ORIGINAL_FILE, ORIGINAL_TOKENIZER, TextEncoder, clean_text, infer_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")
tokenizers = pytest.importorskip("tokenizers")

DATA = Path(__file__).parent / "data"
VOCABULARY = ["a", "cat", "and", "dog", "run", "over", "the", "green", "hill", "at", "night"]
PAD, EOS, UNKNOWN = 0, 1, 2
TEXT_LEN = 16


@pytest.fixture(scope="module")
def state():
    """A small encoder in the names of the original file."""
    return {name: tensor.float() for name, tensor in load_file(DATA / "t5_weights.safetensors").items()}


@pytest.fixture(scope="module")
def vectors():
    return load_file(DATA / "codec_vectors.safetensors")


def save_tokenizer(folder):
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN, **{word: 3 + n for n, word in enumerate(VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("original")
    torch.save(state, folder / ORIGINAL_FILE)
    save_tokenizer(folder / ORIGINAL_TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def encoder(original):
    return TextEncoder.from_pretrained(original, dtype=torch.float32, text_len=TEXT_LEN)


def difference(a, b) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return (a - b).abs().max().item()


def test_encode_ids_agrees_with_the_reference(encoder, vectors):
    prompt_embeds = encoder.encode_ids(vectors["t5.ids"], vectors["t5.mask"])
    assert difference(prompt_embeds, vectors["t5.embeds"]) < 1e-4


def test_prompts_to_embeddings(encoder):
    prompt_embeds = encoder(["a  cat\n and dog ", "the unknownword"])
    ids = torch.tensor([[3, 4, 5, 6, EOS], [9, UNKNOWN, EOS, PAD, PAD]])
    ids = torch.nn.functional.pad(ids, (0, TEXT_LEN - 5))
    mask = torch.zeros_like(ids)
    mask[0, :5] = mask[1, :3] = 1
    full_length = encoder.encode_ids(ids, mask) * mask[..., None]
    assert difference(prompt_embeds, full_length) < 1e-5
    assert prompt_embeds.shape == (2, TEXT_LEN, 64)
    assert not prompt_embeds[0, 5:].any() and not prompt_embeds[1, 3:].any() and prompt_embeds[1, 2].any()


def test_a_prompt_does_not_depend_on_its_neighbours(encoder):
    together = encoder(["a cat", "dog and cat run over the green hill", ""])
    assert difference(together[:1], encoder(["a cat"])) < 1e-5
    assert together[2, 0].any() and not together[2, 1:].any()


def test_long_prompts_are_truncated_and_keep_the_end_token(encoder):
    prompt_embeds = encoder([" ".join(["cat"] * 50)])
    ids = torch.tensor([[4] * (TEXT_LEN - 1) + [EOS]])
    assert difference(prompt_embeds, encoder.encode_ids(ids, torch.ones_like(ids))) < 1e-5


def test_diffusers_layout(tmp_path, encoder):
    encoder.model.save_pretrained(tmp_path / "text_encoder", max_shard_size="40KB")
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    save_tokenizer(tmp_path / "tokenizer")
    loaded = TextEncoder.from_pretrained(tmp_path, dtype=torch.float32, text_len=TEXT_LEN)
    prompts = ["a green cat", "night"]
    assert torch.equal(loaded(prompts), encoder(prompts))


def test_dtype_and_shared_token_table(original):
    half = TextEncoder.from_pretrained(original, dtype=torch.bfloat16, text_len=TEXT_LEN)
    assert half.dtype == torch.bfloat16 and half(["a cat"]).dtype == torch.bfloat16
    assert half.model.encoder.embed_tokens is half.model.shared
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in half.model.parameters())


def test_config_from_shapes(state):
    config = infer_config(state, Path("file"))
    assert (config["vocab_size"], config["d_model"], config["d_ff"]) == (200, 64, 96)
    assert (config["num_heads"], config["d_kv"], config["num_layers"]) == (4, 16, 2)
    assert config["relative_attention_num_buckets"] == 32


def test_clean_text():
    assert clean_text("  a\t\ncat  &amp;amp; dog ") == "a cat & dog"
    assert clean_text("schÃ¶n") == "schön"
    assert clean_text("") == ""


def test_wrong_files(tmp_path, state):
    with pytest.raises(CheckpointError, match="has neither models_t5"):
        TextEncoder.from_pretrained(tmp_path)
    torch.save(state, tmp_path / ORIGINAL_FILE)
    with pytest.raises(CheckpointError, match="umt5-xxl: no such folder, the tokenizer is needed"):
        TextEncoder.from_pretrained(tmp_path)
    (tmp_path / ORIGINAL_TOKENIZER).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no tokenizer could be read") as error:
        TextEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    save_tokenizer(tmp_path / ORIGINAL_TOKENIZER)
    torch.save({name: t for name, t in state.items() if name != "norm.weight"}, tmp_path / ORIGINAL_FILE)
    with pytest.raises(CheckpointError, match="missing: encoder.final_layer_norm.weight"):
        TextEncoder.from_pretrained(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / ORIGINAL_FILE)
    with pytest.raises(CheckpointError, match="not a umT5 encoder"):
        TextEncoder.from_pretrained(tmp_path)


def test_wrong_prompts(encoder):
    for prompts in ("a cat", [], [1]):
        with pytest.raises(InputError, match="list of at least one string"):
            encoder(prompts)


def test_missing_extra(monkeypatch, original):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cfpp-rt\[wan\]'"):
        TextEncoder.from_pretrained(original)


@pytest.mark.parametrize("offloads", [False, True])
def test_the_encoder_moves_to_the_host_between_prompts(encoder, model, monkeypatch, offloads: bool):
    moves = []
    monkeypatch.setattr(TextEncoder, "to", lambda self, device: moves.append(str(device)))
    pipeline = Pipeline(model, NoDecoder(4), encoder, offload_text=offloads)
    text = pipeline.encode_prompt(["a cat"])
    assert torch.equal(text, encoder(["a cat"]))
    assert moves == (["cpu", "cpu"] if offloads else ["cpu"])


def test_an_encoder_of_a_million_layers_is_refused_before_it_is_made(tmp_path, encoder):
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    save_tokenizer(tmp_path / "tokenizer")
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1_000_000}))
    with pytest.raises(CheckpointError, match=r"config\.json: num_layers must be in 1\.\.1024, got 1000000"):
        TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "unit", ["&amp;", "amp;", "&#38;", "#38;", "&lt;", "Ã", "Ãƒ", " ", "<", "&amp", "\x1b[0m"], ids=ascii
)
def test_cleaning_takes_little_time_whatever_the_prompt(unit):
    prompt = f"a cat {'&' if unit.endswith(';') else ''}" + unit * (400_000 // len(unit))
    began = time.monotonic()
    assert clean_text(prompt).startswith("a cat")
    assert time.monotonic() - began < 1.0


def test_cutting_does_not_reach_the_tokens_that_count():
    """512 tokens have at most 16 characters each; whitespace does not count towards the limit."""
    words = " ".join(f"word{number}" for number in range(40_000))
    assert clean_text(words)[:8000] == words[:8000]
    assert clean_text("a" + " \n\t" * 20_000 + "cat &amp;amp; dog") == "a cat & dog"
    for text in ("a cat &amp;amp;amp; dog", "schÃ¶n " * 100, "x" * 8000 + " &lt;b&gt;"):
        assert len(text) < 8192 and clean_text(text) == clean_text(text, 4096)
