import pytest
import torch

from sdlora.errors import ConfigError
from sdlora.lora.init import initial_factors


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 4, 3, 3), (30, 4, 1, 1)])
def test_pissa_is_the_best_approximation_of_rank_r(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=generator())
    down, up = initial_factors("pissa", weight, 3, 0.5, generator=generator())
    assert down.shape == (3, *shape[1:])
    assert up.shape == (shape[0], 3, *(1 for _ in shape[2:]))
    product = 0.5 * up.flatten(1).double() @ down.flatten(1).double()
    values = torch.linalg.svdvals(weight.flatten(1).double())
    left = torch.linalg.matrix_norm(weight.flatten(1).double() - product)
    assert left.item() == pytest.approx(values[3:].pow(2).sum().sqrt().item(), rel=1e-5)  # Eckart and Young
    torch.testing.assert_close(down.flatten(1).norm(dim=1), up.flatten(1).norm(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 20), (12, 4, 3, 3)])
def test_orthogonal_takes_the_last_triplets_of_a_random_matrix(shape: tuple[int, ...]) -> None:
    down, up = initial_factors("orthogonal", torch.zeros(shape), 3, 1.0, generator=generator())
    rows, columns = shape[0], torch.zeros(shape).flatten(1).shape[1]
    matrix = torch.randn(rows, columns, generator=generator()).double() / 3
    # The matrix without its first triplets, whose squares are the largest eigenvalues of M M^T.
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    expected = vectors[:, :3] @ vectors[:, :3].T @ matrix
    torch.testing.assert_close(up.flatten(1).double() @ down.flatten(1).double(), expected, atol=1e-5, rtol=1e-4)
    across = down.flatten(1) @ down.flatten(1).T
    assert (across - torch.diag(across.diag())).abs().max() < 1e-4 * across.max()


def test_rank_above_the_layers_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 4 .* found 5"):
        initial_factors("pissa", torch.zeros(4, 9), 5, 1.0, generator=generator())
