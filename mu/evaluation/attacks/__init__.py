"""Attacks on an unlearned model: whether a concept that plain prompts no longer reach can be brought back."""
