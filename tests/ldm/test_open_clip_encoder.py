"""The text encoder of SD v2 against open_clip's own network and tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mu.algorithms.saliency_unlearning.configs import PACKAGED
from mu.ldm import LatentDiffusion, ModelConfigError, load_model, save_checkpoint
from mu.ldm.checkpoint import load_state_dict
from mu.ldm.model_config import parse_model_config
from mu.ldm.tensor_file import read_state_dict
from tests.conftest import TINY_V2, randomise, tiny_model_yaml

ModelMaker = Callable[..., LatentDiffusion]
PREFIX = "cond_stage_model.model."
PROMPTS = ["", "A Cats image in Fluent Flat style.", "a photo of a cat, highly detailed " * 20]


def open_clip_network(*, width: int, heads: int, layers: int, inner: int) -> torch.nn.Module:
    from open_clip.transformer import TextTransformer

    return TextTransformer(
        context_length=77,
        vocab_size=49408,
        width=width,
        heads=heads,
        layers=layers,
        mlp_ratio=inner / width,
        output_dim=width,
    ).eval()


def their_tokens(prompts: list[str]) -> torch.Tensor:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=77)(prompts)  # (B, 77)


def test_the_names_of_sd_v2_are_those_of_open_clip() -> None:
    model = load_model(PACKAGED / "sd_v2_base.yaml", device="meta")
    with torch.device("meta"):
        theirs = open_clip_network(width=1024, heads=16, layers=24, inner=4096).state_dict()
    theirs["logit_scale"] = torch.empty((), device="meta")  # of the whole CLIP model; in every checkpoint
    ours = {
        key.removeprefix(PREFIX): tensor.shape
        for key, tensor in model.state_dict().items()
        if key.startswith(PREFIX)
    }
    beside = {name for name in theirs if model.is_carried(PREFIX + name)}
    assert ours == {name: tensor.shape for name, tensor in theirs.items() if name not in beside}
    assert {name.partition("resblocks.")[2].partition(".")[0] or name for name in beside} == {
        "23",
        "text_projection",
        "logit_scale",
    }


@pytest.mark.parametrize("layer", ["penultimate", "last"])
@torch.no_grad()
def test_embeddings_are_those_of_open_clip(make_tiny_model: ModelMaker, layer: str) -> None:
    model = make_tiny_model(**{**TINY_V2, "text": {"num_hidden_layers": 3, "layer": layer}})
    theirs = open_clip_network(width=32, heads=2, layers=3, inner=64)
    randomise(theirs, seed=3)
    weights = {PREFIX + name: tensor for name, tensor in theirs.state_dict().items()}
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("cond_stage_model.")}
    load_state_dict(model, {**rest, **weights}, source="open_clip")

    tokens = their_tokens(PROMPTS)
    if layer == "penultimate":
        theirs.transformer.resblocks = theirs.transformer.resblocks[:-1]
    x = theirs.token_embedding(tokens) + theirs.positional_embedding  # (3, 77, 32)
    expected = theirs.ln_final(theirs.transformer(x, attn_mask=theirs.attn_mask))
    ours = model.embed(PROMPTS)
    assert ours.shape == (3, 77, 32)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_tokens_are_filled_up_as_open_clip_does() -> None:
    from mu.ldm.text_encoder import OPEN_CLIP_PAD_TOKEN, tokenize

    prompts = [*PROMPTS, "one! two!"]
    assert torch.equal(tokenize(prompts, pad_token=OPEN_CLIP_PAD_TOKEN), their_tokens(prompts))
    # CLIP's own way is as it was
    assert tokenize([""])[0].tolist() == [49406] + [49407] * 76


def test_what_is_not_run_is_written_back_to_the_bit(tmp_path, make_tiny_model: ModelMaker) -> None:
    model = make_tiny_model(**TINY_V2)
    beside = {
        f"{PREFIX}transformer.resblocks.2.ln_1.weight": torch.rand(32).half(),
        f"{PREFIX}transformer.resblocks.2.attn.in_proj_weight": torch.rand(96, 32),
        f"{PREFIX}text_projection": torch.rand(32, 32),
        f"{PREFIX}logit_scale": torch.tensor(4.6),
        f"{PREFIX}attn_mask": torch.full((77, 77), -torch.inf).triu(1),
    }
    load_state_dict(model, {**model.state_dict(), **beside}, source="m.ckpt")
    save_checkpoint(model, tmp_path / "out.safetensors")
    written, _ = read_state_dict(tmp_path / "out.safetensors")
    for key, tensor in beside.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor)
    assert written.keys() == model.state_dict().keys() | beside.keys()


def test_the_yaml_is_checked() -> None:
    yaml = tiny_model_yaml(**TINY_V2)["model"]
    text = parse_model_config(yaml).cond_stage
    assert text is not None
    assert (text.layer, text.layers_run) == ("penultimate", 2)  # type: ignore[union-attr]
    for key, value, says in (
        ("layer", "pooled", "layer is 'pooled'; allowed: last, penultimate"),
        ("arch", "ViT-bigG-14", "arch = 'ViT-bigG-14' is not built here; supported: 'ViT-H-14'"),
        ("hidden_size", 64, "64 wide"),
    ):
        changed = tiny_model_yaml(**{**TINY_V2, "text": {**TINY_V2["text"], key: value}})["model"]
        with pytest.raises(ModelConfigError, match=says):
            parse_model_config(changed)
