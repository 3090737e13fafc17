"""Unified Concept Editing (UCE): cross-attention keys and values of a concept become a substitute's, in closed form.

Source: Gandikota et al., WACV 2024 (arXiv 2308.14761). Importing this package loads nothing heavy.
"""
