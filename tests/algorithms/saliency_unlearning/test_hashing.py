"""How much a run hashes: SHA-256 is slower than reading, and what the written file proves needs none."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.model import SaliencyUnlearnModel
from mu.ldm import load_model
from mu.ldm.tensor_file import fingerprint, read_state_dict
from mu.unlearning.checkpoints import Checkpoints
from mu.unlearning.output import original_of

SMALL = 400_000
"""Bytes of all else: images, latents, embeddings, masks, configs."""


class Counting:
    """Stands in for hashlib.sha256 and counts what it is given."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sha256 = hashlib.sha256

    def __call__(self, content: Any = b"") -> Any:
        counter, inner = self, self._sha256()

        class Digest:
            def update(self, more: Any) -> None:
                counter.bytes += memoryview(more).nbytes
                inner.update(more)

            def digest(self) -> bytes:
                return inner.digest()

            def hexdigest(self) -> str:
                return inner.hexdigest()

        digest = Digest()
        digest.update(content)
        return digest


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(hashlib, "sha256", counting)
    return counting


def nbytes(model: Any, prefix: str = "") -> int:
    return sum(value.nbytes for name, value in model.state_dict().items() if name.startswith(prefix))


def test_a_run_without_checkpoints_hashes_the_unet_once_and_what_it_writes(
    tiny_runs: Any, tmp_path: Path, hashed: Counting
) -> None:
    """Beside them: the encoders, by which cached latents are known, and the patch: values old and new, and its file."""
    source = tmp_path / "foreign.ckpt"  # without a SHA-256 of ours, which reading would compare
    torch.save({"state_dict": read_state_dict(tiny_runs.checkpoint())[0]}, source)
    model = load_model(tiny_runs.model_config, source)
    unet, whole = nbytes(model, "model."), nbytes(model)
    keys = {"ckpt_path": str(source), "output_dir": str(tmp_path / "runs"), "dataset_type": "generated"}

    made = MaskingAlgorithm(tiny_runs.mask_config(**keys)).run()
    hashed.bytes = 0
    MaskingAlgorithm(tiny_runs.mask_config(**keys)).run()
    # By the whole model sampled images are known, by the encoders latents, and by the UNet the mask.
    assert hashed.bytes <= whole + (whole - unet) + unet + SMALL

    result = SaliencyUnlearningAlgorithm(
        tiny_runs.train_config(**keys, mask_path=str(made["masks"][0.5]), epochs=1)
    )
    result.run()  # samples and encodes what the mask did not need
    hashed.bytes = 0
    written = result.run()
    patch = 3 * 4 * written["weights_changed"]
    assert hashed.bytes <= whole + unet + (whole - unet) + whole + patch + SMALL
    assert hashed.bytes >= unet + whole  # the counter counts


def test_what_a_run_is_of_does_not_keep_its_weights(tiny_runs: Any, tmp_path: Path) -> None:
    """Weights that move to another place or layout would else stay in memory twice, for the whole run."""
    config = tiny_runs.train_config(masking="none")
    ldm = load_model(tiny_runs.model_config, tiny_runs.checkpoint())
    original = original_of(tiny_runs.checkpoint(), ldm.params)
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.identify(SaliencyUnlearnModel(ldm, "full", None), [], original)
    addresses = {tensor.data_ptr() for tensor in ldm.parameters()}
    elsewhere = [parameter.data.clone() for parameter in ldm.parameters()]
    for parameter, data in zip(ldm.parameters(), elsewhere, strict=True):
        parameter.data = data
    gc.collect()
    held = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    assert not [tensor for tensor in held if tensor.data_ptr() in addresses and tensor.numel() > 1000]


def test_promise_19_a_checkpoint_of_a_run_knows_the_model_as_it_was_loaded(
    tiny_runs: Any, tmp_path: Path
) -> None:
    """Though its identity is computed when weights have moved already: from the file, in the model's own dtypes."""
    from mu.unlearning import checkpoints
    from mu.unlearning.run_state import read_head

    seen: dict[str, str] = {}
    config = tiny_runs.train_config(
        masking="none", checkpoint_every_steps=1, output_dir=str(tmp_path), epochs=1
    )
    really = checkpoints.Checkpoints.save

    def noting(self: Any, *saved: Any) -> Path:
        path = really(self, *saved)
        seen.update(read_head(path).identity)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", noting)
        SaliencyUnlearningAlgorithm(config).run()
    assert seen["ckpt_path"] == fingerprint(
        load_model(tiny_runs.model_config, tiny_runs.checkpoint()).state_dict()
    )
