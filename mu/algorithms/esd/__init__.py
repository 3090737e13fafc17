"""Erased Stable Diffusion (Gandikota et al. 2023): no images, the model's own guidance is turned against the concept."""
