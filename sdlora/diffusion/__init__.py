"""The mathematics of diffusion training: plain tensors in and out. Floor 2."""
