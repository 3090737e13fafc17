"""Machine unlearning for latent diffusion models.

Importing this package loads nothing else: models, data sets and methods are imported from their own modules.
"""

__version__ = "0.1.0"
