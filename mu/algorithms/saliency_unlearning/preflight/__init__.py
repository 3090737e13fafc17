"""What a run will do, need and write, found out before its model is loaded."""

from mu.algorithms.saliency_unlearning.preflight.plan import Plan, say_warnings
from mu.algorithms.saliency_unlearning.preflight.planning import plan_mask, plan_training

__all__ = ["Plan", "plan_mask", "plan_training", "say_warnings"]
