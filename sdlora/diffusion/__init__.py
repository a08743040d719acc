"""The mathematics of diffusion: noise, timesteps, losses. Plain tensors."""
