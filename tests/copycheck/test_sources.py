"""Which training images the copies are of, from lists of matches."""

from sdlora.copycheck.sources import MOST_COMPARED, CopiedImage, advice, copied_images

TWINS = {"whole": ["crop"], "crop": ["whole"]}
EXPOSURES = {"whole": 20, "crop": 20, "other": 60}


def found(*names: str, new: int = 0) -> list[CopiedImage]:
    nearest = [(name, index < new) for index, name in enumerate(names)]
    return copied_images(nearest, lambda name: TWINS.get(name, []), EXPOSURES)


def test_twins_count_as_one_image() -> None:
    images = found("whole", "crop", "other", "crop", "crop", new=2)
    assert images == [CopiedImage("crop", 4, 2, 20, ["whole"]), CopiedImage("other", 1, 0, 60, [])]
    assert found() == []


def test_twins_are_looked_for_among_the_most_matched_alone() -> None:
    asked: list[str] = []
    names = [name for count, name in enumerate("abcde", 1) for _ in range(count)]
    copied_images([(name, True) for name in names], lambda name: asked.append(name) or [], {})  # type: ignore[func-returns-value]
    assert asked == ["e", "d", "c"] and len(asked) == MOST_COMPARED


def test_advice_follows_from_twins_exposures_and_spread() -> None:
    assert advice([], None) == ""
    assert advice(found("other"), 20) == "", "one match says nothing"
    twice = advice(found("whole", "crop", "other"), 20)
    assert "2 of 3 matches" in twice and "2 times, also as crop" in twice
    often = advice(found("other", "other", "third"), 20)
    assert "60 times" in often and "20 times" in often and "repeats" in often
    alone = advice(found("other", "other", "third"), 60)
    assert "Take it out" in alone
    spread = advice(found("a", "b", "c", "d"), 20)
    assert "spread over 4 images" in spread
