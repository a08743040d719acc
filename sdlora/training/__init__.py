"""The training loop and everything a step is made of."""
