"""Unlearning methods, one subpackage each."""
