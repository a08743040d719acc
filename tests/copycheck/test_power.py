"""The chance of a verdict, against the product's verdicts on every number of matches."""

import math

import pytest

from sdlora.copycheck.power import chance_to_notice
from sdlora.copycheck.verdict import FULL, Match, judge


def verdict(matches: int, total: int) -> str:
    found = [Match("", "novel", 0, "", 0.0, 0.0, 0.0, index < matches, "") for index in range(total)]
    return judge(found, []).verdict


def chance(matches: int, total: int, share: float) -> float:
    return math.comb(total, matches) * share**matches * (1 - share) ** (total - matches)


@pytest.mark.parametrize("num_previews", [2, 6, 12, 24, 40])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_chance_sums_the_verdicts_of_all_cases(num_previews: int, share: float) -> None:
    copying = not_clean = 0.0
    for first in range(num_previews + 1):
        told = verdict(first, num_previews)
        more = max(0, FULL - num_previews) if told != "copying" and first else 0
        for later in range(more + 1):
            probability = chance(first, num_previews, share) * chance(later, more, share)
            told = verdict(first + later, num_previews + more)
            copying += probability * (told == "copying")
            not_clean += probability * (told != "clean")
    assert chance_to_notice(num_previews, share) == pytest.approx((copying, not_clean))


def test_more_previews_notice_more() -> None:
    assert [round(chance_to_notice(6, share).not_clean, 2) for share in (0.1, 0.3, 0.6)] == [0.42, 0.88, 1.0]
    assert chance_to_notice(12, 0.3).copying > chance_to_notice(6, 0.3).copying > 0.8
