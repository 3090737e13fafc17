"""What every unlearning method shares: batches, the weights that may move, the loop, what is written and proved."""
