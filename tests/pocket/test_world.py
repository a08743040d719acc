import hashlib
import math
import random

import numpy as np

from sdlora.pocket import world


def test_there_are_at_least_twenty_thousand_scenes() -> None:
    options = (world.KINDS, world.COLORS, world.PATTERNS, world.SIZES, world.POSITIONS, world.PLACES)
    assert math.prod(map(len, options)) == 27_648 >= 20_000


def test_a_scene_is_a_function_of_its_number() -> None:
    scene = world.random_scene(12)
    assert scene == world.random_scene(12) != world.random_scene(13)
    assert world.render(scene).tobytes() == world.render(scene).tobytes()
    assert world.render(scene).size == (64, 64)


def test_images_are_those_that_pocket_was_trained_on() -> None:
    digest = hashlib.sha256(b"".join(world.render(world.random_scene(seed)).tobytes() for seed in range(40)))
    assert digest.hexdigest() == GOLDEN, "the world changed: pocket must be trained anew, then change this hash"


def test_every_kind_colour_and_place_shows() -> None:
    base = world.Scene("ball", "red", "plain", "big", "", "night", 3)
    images = [world.render(world.Scene(kind, "red", "plain", "big", "", "night", 3)) for kind in world.KINDS]
    images += [world.render(world.Scene("ball", color, "plain", "big", "", "night", 3)) for color in world.COLORS]
    images += [world.render(world.Scene("ball", "red", "plain", "big", "", place, 3)) for place in world.PLACES]
    distinct = {image.tobytes() for image in images}
    assert len(distinct) == 16 + 8 + 8 - 2  # the red ball at night is in all three lists
    assert world.render(base).tobytes() in distinct


def test_patterns_stay_inside_the_subject() -> None:
    plain, striped = (world.render(world.Scene("ball", "red", p, "big", "", "snow", 5)) for p in ("plain", "striped"))
    changed = np.argwhere(np.any(np.asarray(plain) != np.asarray(striped), axis=2))
    assert len(changed) > 100
    # A big ball of 21 px around the middle: nothing beyond it may change.
    center = changed.mean(axis=0)
    assert np.linalg.norm(changed - center, axis=1).max() < 23


def test_captions_say_what_is_there() -> None:
    scene = world.Scene("cat", "blue", "striped", "small", "on the left", "sea", 0)
    assert world.caption(scene) == "a small blue striped cat on the left by the sea"
    assert world.caption(world.Scene("cat", "blue", "plain", "", "", "night", 0)) == "a blue cat at night"
    found = {world.training_caption(scene, random.Random(i)) for i in range(300)}
    assert len(found) > 20
    assert all("cat" in text for text in found)
    assert any("named" in text for text in found)


def test_unseen_combinations_are_kept_apart() -> None:
    seen = {(s.kind, s.color, s.place) for s in (world.random_scene(i, unseen=False) for i in range(3000))}
    unseen = {(s.kind, s.color, s.place) for s in (world.random_scene(i, unseen=True) for i in range(1000))}
    assert not seen & unseen
    assert 80 < len(unseen) < 180  # about an eighth of 1024
    for name, options in (("kind", world.KINDS), ("color", world.COLORS), ("place", world.PLACES)):
        index = ("kind", "color", "place").index(name)
        assert {combination[index] for combination in unseen} == set(options)


GOLDEN = "efa1df97e949d6a484990ef1b6763f15990a69627bffe87a5f9a4358d9543dba"
