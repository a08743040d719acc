from sdlora.previews.prompts import novel_prompts

CAPTIONS = ["a photo of a lamp in a green meadow", "a photo of a lamp by the sea", "a photo of a lamp, red"]


def test_places_that_captions_know_come_last() -> None:
    prompts = novel_prompts(["zumi in a green meadow", "zumi at night under the stars"], "zumi", 10)
    assert len(set(prompts)) == 10
    assert set(prompts[-2:]) == {"zumi in a green meadow", "zumi at night under the stars"}


def test_without_a_trigger_the_common_beginning_stands_in_its_place() -> None:
    assert all(prompt.startswith("a photo of a lamp ") for prompt in novel_prompts(CAPTIONS, None, 3))
    assert novel_prompts(["a red cat", "the dog"], None, 1)[0].startswith("a picture ")
    assert novel_prompts(["a picture of it", "a picture of a dog"], None, 1)[0].startswith("a picture ")
    assert novel_prompts(["only one caption"], None, 1)[0].startswith("a picture ")
    assert len(novel_prompts([], "zumi", 2)) == 2
