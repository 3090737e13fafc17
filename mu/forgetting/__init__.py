"""From a word to an unlearned checkpoint: `unlearn_diff forget "Noto"`, `mu.forget("Noto")`."""
