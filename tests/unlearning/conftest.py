"""The tiny runs of the algorithms' tests, here too."""

from __future__ import annotations

from tests.algorithms.saliency_unlearning.conftest import tiny_runs

__all__ = ["tiny_runs"]
