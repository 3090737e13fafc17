"""Commands, run as `python -m mu.algorithms.uce.scripts.<name>`."""
