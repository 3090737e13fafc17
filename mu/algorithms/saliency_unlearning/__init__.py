"""Saliency unlearning (SalUn): find a concept's salient weights, then fine-tune only those.

Source: Fan et al., SalUn, ICLR 2024 (arXiv 2310.12508). Importing this package loads nothing heavy.
"""
