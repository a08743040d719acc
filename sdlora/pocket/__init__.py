"""Pocket: the small Stable Diffusion 1.x that ships with sdlora, its world, its training and its weights.

`world` draws images, `sets` draws the sample sets, `pretrain` makes the weights from nothing.
"""
