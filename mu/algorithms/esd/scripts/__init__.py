"""Commands, run as `python -m mu.algorithms.esd.scripts.<name>`."""
