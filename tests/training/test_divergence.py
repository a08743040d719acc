"""Numbers that are none are found before they are saved."""

from __future__ import annotations

import pytest
import torch

from sdlora.errors import DivergedError
from sdlora.training.divergence import Watch, check_finite


def test_a_cpu_is_judged_at_once() -> None:
    watch = Watch()
    watch.see(1, 0.1, torch.ones(2), torch.tensor(3.0))
    with pytest.raises(DivergedError, match=r"loss became nan at step 2 \(learning rate 0\.1\)"):
        watch.see(2, 0.1, torch.tensor([1.0, float("nan")]), torch.tensor(3.0))
    watch.see(3, 0.1, torch.ones(2), torch.tensor(3.0))  # what was told is not told again
    with pytest.raises(DivergedError, match="gradient became inf at step 4"):
        watch.see(4, 0.1, torch.ones(2), torch.tensor(float("inf")))


def test_under_loss_scaling_gradients_are_not_judged() -> None:
    watch = Watch()
    watch.see(1, 0.1, torch.ones(2), None)
    watch.judge()


def test_what_is_saved_is_named() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("-inf")])
    check_finite({"adapter": [good], "optimizer": []}, 5)
    with pytest.raises(DivergedError, match="optimizer holds NaN or infinite numbers after step 5"):
        check_finite({"adapter": [good], "optimizer": [good, bad]}, 5)
