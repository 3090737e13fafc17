"""What a run will do, need and write, found out before its model is loaded."""

from mu.algorithms.saliency_unlearning.preflight.planning import plan_mask, plan_training
from mu.algorithms.saliency_unlearning.preflight.plan import Plan

__all__ = ["Plan", "plan_mask", "plan_training"]
