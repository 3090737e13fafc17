"""Erased Stable Diffusion (Gandikota et al. 2023): the model's own guidance, turned against the concept."""
