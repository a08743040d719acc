"""NaN and infinity are found before they are saved."""

from __future__ import annotations

import pytest
import torch

from sdlora.errors import DivergedError
from sdlora.training.divergence import DivergenceCheck, check_finite


def test_divergence_on_a_cpu_is_raised_at_once() -> None:
    check = DivergenceCheck()
    check.observe(1, 0.1, torch.ones(2), torch.tensor(3.0))
    with pytest.raises(DivergedError, match=r"loss became nan at step 2 \(learning rate 0\.1\)"):
        check.observe(2, 0.1, torch.tensor([1.0, float("nan")]), torch.tensor(3.0))
    check.observe(3, 0.1, torch.ones(2), torch.tensor(3.0))  # raised once only
    with pytest.raises(DivergedError, match="gradient became inf at step 4"):
        check.observe(4, 0.1, torch.ones(2), torch.tensor(float("inf")))


def test_gradients_under_loss_scaling_are_not_checked() -> None:
    check = DivergenceCheck()
    check.observe(1, 0.1, torch.ones(2), None)
    check.check_pending()


def test_divergence_of_saved_tensors_names_them() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("-inf")])
    check_finite({"adapter": [good], "optimizer": []}, 5)
    with pytest.raises(DivergedError, match="optimizer holds NaN or infinite values after step 5"):
        check_finite({"adapter": [good], "optimizer": [good, bad]}, 5)
