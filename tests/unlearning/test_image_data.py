"""Batches of images, as a method asks for them: with and without a retain term, compared with what it names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mu.config import as_dict
from mu.ldm import LatentDiffusion
from mu.unlearning.config import DataKeys
from mu.unlearning.image_data import ImageData, training_steps


@pytest.fixture
def config(tmp_path: Path) -> SimpleNamespace:
    """Two styles with two objects, of which Noto is forgotten; no key for images to retain in a step."""
    keys = DataKeys(
        dataset_type="generated",
        template_name="Noto",
        styles=("Noto", "Blob"),
        objects=("Cats", "Dogs"),
        images_per_prompt=2,
        sample_steps=2,
        sample_precision="fp32",
        processed_dataset_dir=str(tmp_path),
    )
    return SimpleNamespace(**as_dict(keys), batch_size=3, epochs=2, seed=0)


def sampled(folder: Path) -> set[str]:
    return {path.parts[-3] for path in folder.glob("generated/*/*/*/*.png")}


def test_without_a_retain_term_nothing_retained_is_sampled_or_given(
    tiny_model: LatentDiffusion, config: SimpleNamespace, tmp_path: Path
) -> None:
    data = ImageData(config, tiny_model.eval(), reference_prompt="", retain=False)
    batches = data.train_batches
    assert sampled(tmp_path) == {"Noto"}
    assert not list(tmp_path.glob("index/*/*/retain"))
    assert batches.part_sizes == (3,)
    assert (batches.steps_per_epoch, batches.total_steps) == (2, training_steps(config, data.rows)) == (2, 4)
    with torch.no_grad():
        empty = tiny_model.embed([""])[0]
    for batch in (batches[0], batches[3], *batches.validation()):
        assert batch.retain is None
        assert batch.forget.reference_context.shape == batch.forget.context.shape
        for reference in batch.forget.reference_context:
            torch.testing.assert_close(reference, empty)
    assert set(batches[0].images) == {"forget"}
    assert set(data.retained) == {"A Cats image in Blob style.", "A Dogs image in Blob style."}


def test_the_reference_is_the_substitute_or_any_prompt(
    tiny_model: LatentDiffusion, config: SimpleNamespace, tmp_path: Path
) -> None:
    config.retain_batch_size = None
    prompts = ["A Cats image in Blob style.", "A Dogs image in Blob style.", "a wall"]
    with torch.no_grad():
        contexts = dict(zip(prompts, tiny_model.eval().embed(prompts), strict=True))
    substituted = ImageData(config, tiny_model).train_batches[0]
    assert sampled(tmp_path) == {"Noto", "Blob"}
    assert len(substituted.retain.latents) == 3
    for image, reference in zip(
        substituted.images["forget"], substituted.forget.reference_context, strict=True
    ):
        torch.testing.assert_close(reference, contexts[f"A {Path(image).parent.name} image in Blob style."])
    same = ImageData(config, tiny_model, reference_prompt="a wall").train_batches[0]
    for reference in same.forget.reference_context:
        torch.testing.assert_close(reference, contexts["a wall"])
    torch.testing.assert_close(same.forget[:4], substituted.forget[:4])  # nothing else is another
