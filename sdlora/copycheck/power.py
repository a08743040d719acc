"""How likely the copy check notices copies, before anything is trained.

Called by `sdlora plan`. Exact, if previews are independent of each other and every copy is found.
"""

from __future__ import annotations

from typing import NamedTuple

from scipy.stats import binom

from sdlora.copycheck.verdict import FULL, fewest_copying, most_clean

SHARES = (0.1, 0.3, 0.6)
"""Shares of copies for which the chance is computed."""


class Noticed(NamedTuple):
    """The probabilities, in [0, 1], of two verdicts on an epoch that copies.

    Attributes:
        copying: Of "copying".
        not_clean: Of "copying" or "watch".
    """

    copying: float
    not_clean: float


def chance_to_notice(num_previews: int, share: float) -> Noticed:
    """How likely an epoch is noticed if a share of its images are copies.

    Args:
        num_previews: Drawn after the epoch, at least 1; there are 24 where some, but too few, match.
        share: In [0, 1].
    """
    total = max(num_previews, FULL)
    enough, enough_later = fewest_copying(num_previews), fewest_copying(total)
    copying = float(binom.sf(enough - 1, num_previews, share))
    not_clean = copying
    more = total - num_previews
    for found in range(1, enough):
        chance = float(binom.pmf(found, num_previews, share))
        copying += chance * float(binom.sf(enough_later - found - 1, more, share))
        not_clean += chance * float(binom.sf(most_clean(total) - found, more, share))
    return Noticed(copying, not_clean)
