"""The text encoder against transformers' own loading, and the tokenizer against known tokens; all offline."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from mu.ldm import LatentDiffusion, NoTextEncoderError, text_encoder
from mu.ldm.text_encoder import TokenizerError, clip_tokenizer, tokenize
from tests.conftest import TINY_V2

PREFIX = "cond_stage_model.transformer.text_model."
START, END = 49406, 49407
PROMPTS = ["", "A Cats image in Fluent Flat style.", "a photo of a cat, highly detailed " * 20]


def of_transformers(folder: Path, model: LatentDiffusion, hidden_act: str) -> CLIPTextModel:
    """transformers' text model, loaded by itself from a folder that holds our weights under its names."""
    assert model.cond_stage_model is not None
    params = model.params.cond_stage
    assert params is not None
    config: dict[str, Any] = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": params.hidden_size,
        "intermediate_size": params.intermediate_size,
        "num_hidden_layers": params.num_hidden_layers,
        "num_attention_heads": params.num_attention_heads,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {k.removeprefix(PREFIX): v for k, v in model.state_dict().items() if k.startswith(PREFIX)}
    # The names in published files; every release of transformers reads them.
    weights = {f"text_model.{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, info = CLIPTextModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not info["missing_keys"]  # else the encoder is a random one
    assert not info["unexpected_keys"]
    return loaded.eval()


@torch.no_grad()
def test_embeddings_are_those_of_transformers(
    tmp_path: Path, make_tiny_model: Callable[..., LatentDiffusion]
) -> None:
    model = make_tiny_model(text={"num_hidden_layers": 3, "num_attention_heads": 4})
    theirs = of_transformers(tmp_path, model, "quick_gelu")(input_ids=tokenize(PROMPTS)).last_hidden_state
    ours = model.embed(PROMPTS)
    assert ours.shape == (3, 77, 32)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours[0] - ours[1]).abs().max() > 0.1


@torch.no_grad()
def test_the_activation_is_that_of_the_configuration(
    tmp_path: Path, make_tiny_model: Callable[..., LatentDiffusion]
) -> None:
    model = make_tiny_model(text={"hidden_act": "gelu"})
    tokens = tokenize(PROMPTS)
    exact = of_transformers(tmp_path, model, "gelu")(input_ids=tokens).last_hidden_state
    quick = of_transformers(tmp_path, model, "quick_gelu")(input_ids=tokens).last_hidden_state
    ours = model.embed(PROMPTS)
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (ours - quick).abs().max() > 1e-3


@torch.no_grad()
def test_a_token_sees_only_those_before_it_and_the_last_norm_is_applied(tiny_model: LatentDiffusion) -> None:
    left, right = tiny_model.embed(["a red cat", "a red dog"])
    assert torch.equal(left[:3], right[:3])  # start, a, red
    assert (left[3] - right[3]).abs().max() > 0.1
    norm = tiny_model.state_dict()
    weight, bias = norm[f"{PREFIX}final_layer_norm.weight"], norm[f"{PREFIX}final_layer_norm.bias"]
    plain = (left - bias) / weight  # (77, 32): mean 0 and variance 1 over the features
    torch.testing.assert_close(plain.mean(-1), torch.zeros(77), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.var(-1, correction=0), torch.ones(77), atol=1e-3, rtol=0)


def test_a_model_without_text_encoder_refuses_prompts(
    make_tiny_model: Callable[..., LatentDiffusion],
) -> None:
    with pytest.raises(NoTextEncoderError, match="__is_unconditional__"):
        make_tiny_model(unconditional=True).embed(["a cat"])


# ---- tokenizer ----


def test_known_tokens() -> None:
    tokens = tokenize(["a photo of a cat", "", "Hello World!"])
    assert tokens.shape == (3, 77)
    assert tokens.dtype == torch.int64
    cat = [START, 320, 1125, 539, 320, 2368, END]
    assert tokens[0].tolist() == cat + [END] * 70
    assert tokens[1].tolist() == [START] + [END] * 76
    assert tokens[2].tolist()[:5] == [START, 3306, 1002, 256, END]
    assert len(clip_tokenizer()) == 49408


def test_long_prompts_are_cut_and_still_end() -> None:
    tokens = tokenize(["cat " * 200])[0].tolist()
    assert tokens == [START] + [2368] * 75 + [END]


def test_tokens_are_those_of_open_clip() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    prompts = [
        "A Sandwiches image in Abstractionism style.",
        "A Cats image in Fluent Flat style.",
        "  many   spaces,\n and 12345 numbers (weighted:1.3)!!! ",
        "it's the dog's café; naïve Ångström, façade",
        "子猫 🐱 кошка",
        "photo-realistic, 8k, f/1.4 -- #nofilter @home <b>",
    ]
    ours = tokenize(prompts)
    theirs = SimpleTokenizer(context_length=77, clean="lower")(prompts)  # (6, 77), padded with zeros
    for prompt, our, their in zip(prompts, ours.tolist(), theirs.tolist(), strict=True):
        length = their.index(END) + 1
        assert our[:length] == their[:length], prompt
        assert set(our[length:]) <= {END}


@pytest.fixture
def no_cached_tokenizer() -> Iterator[None]:
    clip_tokenizer.cache_clear()
    yield
    clip_tokenizer.cache_clear()


@pytest.mark.usefixtures("no_cached_tokenizer")
def test_promise_06_a_tokenizer_that_forgot_its_vocabulary_is_refused(
    monkeypatch: pytest.MonkeyPatch, make_tiny_model: Callable[..., LatentDiffusion]
) -> None:
    # What transformers 5 builds, without a word, when it is given file names: start and end alone.
    monkeypatch.setattr(
        text_encoder,
        "CLIPTokenizer",
        lambda **_: CLIPTokenizer(vocab_file="vocab.json", merges_file="merges.txt"),
    )
    for build in (clip_tokenizer, make_tiny_model, lambda: make_tiny_model(**TINY_V2)):
        with pytest.raises(TokenizerError, match=r"not CLIP's: \d+ tokens \(expected 49408\)"):
            build()


@pytest.mark.usefixtures("no_cached_tokenizer")
def test_promise_06_a_tokenizer_with_other_merges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    merges = text_encoder._read_merges()
    monkeypatch.setattr(text_encoder, "_read_merges", lambda: [*merges[1:], merges[0]])
    with pytest.raises(TokenizerError, match="not CLIP's: 49408 tokens"):
        clip_tokenizer()


@pytest.mark.usefixtures("no_cached_tokenizer")
def test_without_open_clip_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "find_spec", lambda _name: None)
    with pytest.raises(TokenizerError, match="pip install open_clip_torch"):
        clip_tokenizer()


def test_neither_open_clip_is_imported_nor_the_network_used(tmp_path: Path) -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from mu.ldm.text_encoder import tokenize\n"
        "print(tokenize(['a photo of a cat'])[0, :7].tolist())\n"
        "print('open_clip' in sys.modules)"
    )
    empty_home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], env=empty_home, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == f"[{START}, 320, 1125, 539, 320, 2368, {END}]\nFalse", result.stderr
