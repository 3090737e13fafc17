"""`MaskedAdam`, under the name that other programs know; it is `mu.unlearning.optim`'s."""

from __future__ import annotations

from mu.unlearning.optim import MaskedAdam

__all__ = ["MaskedAdam"]
