"""Prompts in one line, as kohya's sd-scripts have them: "a cat --n blurry --w 832 --h 1216 --d 7 --l 5.5 --s 20".

The only place that reads and writes such lines: for `preview.prompts`, the studio's field and the importer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FLAGS = {
    "n": "negative_prompt", "w": "width_px", "h": "height_px", "d": "seeds", "l": "guidance", "s": "num_steps",
    "ss": "sampler", "am": "lora_scale",
}  # fmt: skip
"""The option that each flag stands for; `--d` may be given more than once, and `--am` is that of kohya's gen_img."""

SAMPLERS = {
    "euler": "euler", "k_euler": "euler", "euler_a": "euler_a", "k_euler_a": "euler_a",
    "dpmpp_karras": "dpmpp_2m_karras", "unipc": "unipc",
}  # fmt: skip
"""Our name of a sampler by those of other trainers."""

_FLAG = re.compile(r"(?:^|\s)--([a-zA-Z]+)(?=\s|$)")
_PARTS = {"seeds": int, "num_steps": int, "width_px": int, "height_px": int, "guidance": float, "lora_scale": float}


def split_line(line: str) -> str | dict[str, Any]:
    """A line as an entry of `preview.prompts`: a table, or the text as it is if it has none of the flags.

    Raises:
        ValueError: Beside a flag that is known, one is not, or a value cannot be read.
    """
    table, unknown = read_line(line)
    if len(table) == 1:
        return line
    if unknown:
        known = ", ".join(f"--{flag} ({option})" for flag, option in FLAGS.items())
        raise ValueError(f"unknown flags {', '.join(unknown)} in {line!r}; the flags of a prompt are {known}")
    return table


def read_line(line: str) -> tuple[dict[str, Any], list[str]]:
    """A line as a table of `preview.prompts`, and the flags that are not known.

    Raises:
        ValueError: A value cannot be read.
    """
    text, *parts = _FLAG.split(line)
    table: dict[str, Any] = {"text": text.strip()}
    unknown: list[str] = []
    for given, value in zip(parts[::2], parts[1::2], strict=True):
        flag = given.lower()
        if (name := FLAGS.get(flag)) is None:
            unknown.append(f"--{flag}")
        elif name == "seeds":
            table.setdefault(name, []).append(_value(name, value.strip(), flag))
        else:
            table[name] = _value(name, value.strip(), flag)
    return table, list(dict.fromkeys(unknown))


def _value(name: str, value: str, flag: str) -> Any:
    if name == "negative_prompt":
        return value
    if name == "sampler":
        return SAMPLERS.get(value.lower(), value)
    try:
        read = _PARTS[name](value)
    except ValueError as error:
        raise ValueError(f"--{flag} {value!r} of a prompt is not a number") from error
    return read // 8 * 8 if name in ("width_px", "height_px") else read  # as kohya's trainers round them


def as_line(table: Mapping[str, Any]) -> str:
    """The line that `split_line` reads as a table of `preview.prompts`."""
    words = [str(table["text"])]
    for flag, name in FLAGS.items():
        values = table[name] if name == "seeds" and name in table else [table[name]] if name in table else []
        words += [f"--{flag} {value}".strip() for value in values]
    return " ".join(words)
