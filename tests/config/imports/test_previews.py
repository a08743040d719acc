from typing import Any

import pytest

from sdlora.config.imports.previews import previews


def entry(text: str, **own: Any) -> dict[str, Any]:
    return {"text": text, **own}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], {}),
        ([entry(" ", seeds=1)], {}),
        ([entry("a"), entry("b"), entry(" a ")], {"preview.prompts": ["a", "b"]}),
        (
            [entry("a", guidance="6", seeds="1", negative_prompt=""), entry("b", guidance=6, seeds=1)],
            {"preview.prompts": ["a", "b"], "preview.seeds": [1], "preview.guidance": 6},
        ),
        (
            [entry("a", width_px=833, seeds=[1]), entry("b", width_px=832, seeds=-1, lora_scale=0.5)],
            {
                "preview.prompts": [{"text": "a", "seeds": [1]}, {"text": "b", "lora_scale": 0.5}],
                "preview.width_px": 832,
            },
        ),
        ([entry("a", lora_scale=1), entry("a", sampler="k_euler")], {
            "preview.prompts": ["a", {"text": "a", "sampler": "euler"}],
        }),
        ([entry("a", lora_scale=0.5)], {"preview.prompts": [{"text": "a", "lora_scale": 0.5}]}),
    ],
)  # fmt: skip
def test_what_all_prompts_share_is_set_once_and_the_rest_with_each(
    entries: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    assert previews(entries) == expected
