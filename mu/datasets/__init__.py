"""Data sets: tables of styles and objects, prompts, and indices of (image, prompt, concept) rows.

Importing this package loads neither torch nor transformers; the modules that need them say so themselves.
"""
