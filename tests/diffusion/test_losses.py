import torch

from sdlora.diffusion.losses import mse_per_example


def test_one_loss_per_example_in_float32() -> None:
    target = torch.zeros(2, 4, 3, 3)
    predicted = torch.stack([torch.full((4, 3, 3), 0.5), torch.full((4, 3, 3), -2.0)]).bfloat16()
    losses = mse_per_example(predicted, target)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [0.25, 4.0]
