"""The CLIP score by its formula, with a tiny model of open_clip whose weights lie in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import open_clip
import pytest
import torch
from PIL import Image

from mu.evaluation.asked_images import AskedImage
from mu.evaluation.clip_score import ClipError, ClipScorer
from tests.memory_limit import hungry

NAME = "tiny-of-these-tests"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(open_clip.create_model(NAME).state_dict(), path)
    return path


def images(folder: Path) -> list[AskedImage]:
    found = []
    for number, prompt in enumerate(("a cat", "a dog", "a cat", "a castle by the sea")):
        values = numpy.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        found.append(AskedImage(folder / f"{number}.png", prompt))
    return found


def test_scores_are_the_cosine_of_image_and_prompt(weights: Path, tmp_path: Path) -> None:
    asked = images(tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=str(weights))
    expected = []
    with torch.no_grad():
        for image in asked:
            seen = model.encode_image(preprocess(Image.open(image.path))[None])
            said = model.encode_text(open_clip.get_tokenizer(NAME)([image.prompt]))
            expected.append(max(0.0, 100 * float(torch.cosine_similarity(seen, said))))
    scorer = ClipScorer(NAME, str(weights))
    for batch_size in (1, 3):
        assert scorer.scores(asked, batch_size=batch_size) == pytest.approx(expected, abs=1e-3)
    assert len(set(expected)) > 1
    assert scorer.name == f"{NAME}, weights.pt"


def test_promise_30_prompts_that_are_cut_are_told_once(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = images(tmp_path)
    asked[1] = AskedImage(asked[1].path, " ".join(["street"] * 76))
    scorer = ClipScorer(NAME, str(weights))
    scorer.scores(asked[:1], batch_size=2)
    assert caplog.messages == []
    scorer = ClipScorer(NAME, str(weights))
    for _ in range(2):
        scorer.scores(asked, batch_size=2)
    (message,) = caplog.messages
    assert message.startswith("CLIP score: 1 of 3 prompts are longer than the 77 tokens")


def test_promise_22_clip_scores_are_the_same_when_memory_runs_out(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, scorer = images(tmp_path), ClipScorer(NAME, str(weights))
    expected = scorer.scores(asked, batch_size=4)
    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(scorer.model, name, hungry(getattr(scorer.model, name), holds=1))
    assert scorer.scores(asked, batch_size=4) == pytest.approx(expected, abs=1e-3)


def test_models_and_weights_that_cannot_be_had_are_told(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="clip_model: open_clip has no 'ViT-B-33'"):
        ClipScorer("ViT-B-33", str(weights))
    with pytest.raises(
        ClipError, match=r"clip_weights: '.*none.pt' is neither a file nor one of open_clip's .*: openai"
    ):
        ClipScorer("ViT-B-32", str(tmp_path / "none.pt"))
    torch.save({"visual.proj": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ClipError, match=r"the weights '.*other.pt' of .* cannot be had"):
        ClipScorer(NAME, str(tmp_path / "other.pt"))


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_args: object, **_options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("open_clip.factory.download_pretrained", cut)
    with pytest.raises(
        ClipError, match=r"cannot be had \(.*no route\). Without a network, download them elsewhere"
    ):
        ClipScorer("RN50", "openai")
