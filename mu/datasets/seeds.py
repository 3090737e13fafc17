"""Which seeds belong to whom. Nothing is imported here."""

from __future__ import annotations

TRAINING_SEED_BASE = 1_000_000
"""The first seed of images that a model is unlearned on; seeds below are left to evaluation."""
