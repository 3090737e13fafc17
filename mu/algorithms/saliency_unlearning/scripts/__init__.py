"""Commands of saliency unlearning, run as `python -m mu.algorithms.saliency_unlearning.scripts.<name>`."""
