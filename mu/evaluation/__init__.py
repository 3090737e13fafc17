"""Measuring what a model forgot and what it kept."""
