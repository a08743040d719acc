from collections import Counter
from itertools import pairwise

import pytest

from sdlora.data.batches import epoch_batches

BUCKETS = ["s", "s", "w", "s", "w", "s", "s"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("epoch", [1, 3])
def test_every_exposure_exactly_once_in_batches_of_one_bucket(batch_size: int, repeats: int, epoch: int) -> None:
    batches = epoch_batches(BUCKETS, repeats, batch_size, epoch, seed=1)
    seen = Counter((exposure.example, exposure.number) for batch in batches for exposure in batch)
    numbers = range((epoch - 1) * repeats + 1, epoch * repeats + 1)
    assert seen == Counter((example, number) for example in range(len(BUCKETS)) for number in numbers)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({BUCKETS[exposure.example] for exposure in batch}) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_repeats_of_each_image_are_spread_over_the_epoch(batch_size: int) -> None:
    repeats = [1, 12, 3, 4, 12, 1, 6]
    batches = epoch_batches(["s"] * 7, repeats, batch_size, 2, seed=1)
    order = [exposure for batch in batches for exposure in batch]
    for index, times in enumerate(repeats):
        places = [place for place, exposure in enumerate(order) if exposure.example == index]
        assert [order[place].number for place in places] == list(range(times + 1, 2 * times + 1))
        gaps = [late - early for early, late in pairwise(places)]
        assert not gaps or max(gaps) < 2 * len(order) / times
    assert epoch_batches(BUCKETS, [4] * 7, 2, 1, 0) == epoch_batches(BUCKETS, 4, 2, 1, 0)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_batches(BUCKETS, 2, 2, 1, 0) == epoch_batches(BUCKETS, 2, 2, 1, 0)
    orders = {tuple(v.example for b in epoch_batches(BUCKETS, 2, 2, e, s) for v in b) for e in (1, 2) for s in (0, 1)}
    assert len(orders) == 4


def test_batch_rarely_contains_an_image_twice() -> None:
    batches = epoch_batches(["s"] * 8, 10, 4, 1, 0)
    assert all(len({exposure.example for exposure in batch}) == 4 for batch in batches)
