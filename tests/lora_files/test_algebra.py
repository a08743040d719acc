"""Every sum and truncation against dense float64 matrices."""

import pytest
import torch

from sdlora.errors import ConfigError, DataError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora_files.algebra import extract, merge, refuse_dora, resize

SHAPES = {"linear": (12, 10), "conv": (8, 6, 3, 3), "point": (9, 7, 1, 1)}


def made(seed: int, rank: int = 4, alpha: float = 3.0, modules: tuple[str, ...] = tuple(SHAPES)) -> LoraState:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        name: LoraWeights(drawn(rank, *SHAPES[name][1:]), drawn(SHAPES[name][0], rank, *SHAPES[name][2:3] and (1, 1)),
                          alpha)
        for name in modules
    }  # fmt: skip


def dense(state: LoraState, name: str) -> torch.Tensor:
    """alpha / r * sum over ranks of column times row, written out in float64."""
    weights = state[name]
    up, down = weights.up.double().flatten(1), weights.down.double().flatten(1)
    columns = sum(torch.outer(up[:, k], down[k]) for k in range(down.shape[0]))
    assert isinstance(columns, torch.Tensor)
    return columns * weights.alpha / down.shape[0]


def test_merge_of_one_lora_with_weight_1_returns_it() -> None:
    state = made(1)
    assert merge([state], [1.0])[0] is state


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3), (0.0, 2.0)])
def test_sum_is_exact_for_any_ranks_alphas_and_modules(weights: tuple[float, float]) -> None:
    one, other = made(1), made(2, rank=3, alpha=1.7, modules=("linear", "conv"))
    found, cost = merge([one, other], weights)
    assert cost.ranks == {}
    for name in SHAPES:
        expected = weights[0] * dense(one, name) + (weights[1] * dense(other, name) if name in other else 0)
        torch.testing.assert_close(dense(found, name), expected, rtol=0, atol=1e-6 * float(expected.abs().max()) + 1e-9)
    assert [found[name].down.shape[0] for name in SHAPES] == [7, 7, 4]
    assert len({w.alpha for w in found.values()}) == 1


def test_sum_cut_to_a_rank_is_the_nearest_with_its_cost() -> None:
    one, other = made(1), made(2)
    found, cost = merge([one, other], [1.0, 0.5], rank=3)
    squared = {}
    for name in SHAPES:
        whole = dense(one, name) + 0.5 * dense(other, name)
        values = torch.linalg.svdvals(whole)
        squared[name] = (float(values[3:].square().sum()), float(values.square().sum()))
        assert float((dense(found, name) - whole).norm()) == pytest.approx(squared[name][0] ** 0.5, rel=1e-5)
    errors = {name: (lost / total) ** 0.5 for name, (lost, total) in squared.items()}
    assert cost.worst == pytest.approx(max(errors.values()), rel=1e-9)
    assert cost.worst_module == max(errors, key=lambda name: errors[name])
    lost, total = (sum(column) for column in zip(*squared.values(), strict=True))
    assert cost.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("rank", [4, 64])
def test_resize_to_full_rank_keeps_the_update(rank: int) -> None:
    state = made(3)
    found, cost = resize(state, rank=rank)
    assert cost.kept_energy == 1.0
    for name in SHAPES:
        assert found[name].down.shape == state[name].down.shape
        torch.testing.assert_close(dense(found, name), dense(state, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_resize_by_energy_keeps_the_fewest_ranks(energy: float) -> None:
    state = made(4)
    found, cost = resize(state, energy=energy)
    for name in SHAPES:
        values = torch.linalg.svdvals(dense(state, name))[:4].square()
        kept = found[name].down.shape[0]
        shares = values.cumsum(0) / values.sum()
        assert shares[kept - 1] >= energy - 1e-12
        assert kept == 1 or shares[kept - 2] < energy
        assert cost.ranks[name] == kept
    assert cost.kept_energy >= energy
    assert len({w.alpha for w in found.values()}) == 1


def test_zero_update_keeps_one_rank() -> None:
    state = {"linear": LoraWeights(torch.ones(4, 10), torch.zeros(12, 4), 1.0)}
    found, cost = resize(state, energy=0.9)
    assert (found["linear"].down.shape[0], cost.kept_energy, cost.relative_error) == (1, 1.0, 0.0)
    assert not dense(found, "linear").any()


def test_rank_above_the_matrix_rank_is_lowered_to_it() -> None:
    found, cost = resize(made(5, rank=32), rank=64)
    assert cost.ranks == {"linear": 10, "conv": 8, "point": 7}
    for name in SHAPES:
        torch.testing.assert_close(dense(found, name), dense(made(5, rank=32), name), rtol=0, atol=3e-6)


def test_extract_finds_differences_and_skips_equal_modules() -> None:
    state = made(6)
    differences = {name: dense(state, name).float().reshape(SHAPES[name]) for name in SHAPES}
    found, cost = extract((differences | {"still": torch.zeros(3, 3)}).items(), 4)
    assert found.keys() == SHAPES.keys()
    assert cost.relative_error < 1e-5
    for name in SHAPES:
        torch.testing.assert_close(dense(found, name), dense(state, name), rtol=0, atol=1e-5)
        assert found[name].down.shape == state[name].down.shape
    with pytest.raises(DataError, match="same weights"):
        extract([("still", torch.zeros(3, 3))], 4)
    with pytest.raises(ConfigError, match=r"--rank .*0"):
        extract(differences.items(), 0)


def test_shape_mismatch_and_dora_are_refused() -> None:
    other = {"linear": LoraWeights(torch.ones(2, 11), torch.ones(12, 2), 1.0)}
    with pytest.raises(DataError, match="'linear'"):
        merge([made(1), other], [1.0, 1.0])
    with pytest.raises(DataError, match=r"hero.*'x'"):
        refuse_dora({"x": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 1.0, torch.ones(4))}, "hero")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({}, "either"), ({"rank": 2, "energy": 0.5}, "either"), ({"rank": 0}, "--rank .*found 0"),
     ({"energy": 0.0}, "--energy .*found 0"), ({"energy": 1.5}, "--energy .*found 1.5"),
     ({"energy": float("nan")}, "--energy .*found nan")],
)  # fmt: skip
def test_rank_or_energy_out_of_range_is_refused(arguments: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resize(made(1), **arguments)  # type: ignore[arg-type]
