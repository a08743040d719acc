"""Command lines that start another trainer's script, as it stands in a shell script or a tutorial.

`detect` calls it for files that are neither TOML nor JSON nor YAML.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template
from typing import Any

from sdlora.config.imports import diffusers, kohya
from sdlora.config.imports.rules import Rule, Source, always, arguments
from sdlora.errors import ConfigError

_KOHYA = ("train_network.py", "sdxl_train_network.py")
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+|set\s+)?([A-Za-z_]\w*)=(.*)$", re.MULTILINE)


def read(content: str, folder: Path) -> tuple[Source, dict[str, Rule]]:
    """The source of a command line and the table for it.

    Args:
        content: A text with one command, in one line or with lines that end in a backslash, a caret or a backtick;
            variables that are set before are replaced.
        folder: The text's folder, where files that the command names may be.

    Raises:
        ConfigError: No command is found, or its script trains something else.
    """
    # In a Windows path, a backslash does not escape anything.
    joined = re.sub(r"[\\^`][ \t]*\r?\n", " ", content)
    lines = [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    command = next((line for line in lines if re.search(r"\.py\b", line) and "--" in line), None)
    if command is None:
        raise ConfigError(
            "The file is neither a configuration of a trainer that sdlora knows nor a command line with a script and "
            "its arguments."
        )
    variables = {name: value.strip().strip("\"'") for name, value in _ASSIGNMENT.findall("\n".join(lines))}
    try:
        words = shlex.split(Template(command).safe_substitute(variables))
    except ValueError as error:
        raise ConfigError(f"The command line cannot be read: {error}.") from error
    index = next((index for index, word in enumerate(words) if word.endswith(".py")), len(words) - 1)
    script = re.split(r"[/\\]", words[index])[-1]
    given: dict[str, Any] = arguments(words[index + 1 :])
    if script in diffusers.SCRIPTS:
        return diffusers.read(script, arguments(words[:index]), given), diffusers.RULES
    if script in _KOHYA:
        is_xl = script.startswith("sdxl")
        source = kohya.of_arguments(f"sd-scripts' {script}", given, folder, {"sdxl": is_xl})
        source.always = [always("SDXL's script", {"base.family": "sdxl"})] if is_xl else []
        return source, kohya.RULES
    known = ", ".join([*diffusers.SCRIPTS, *_KOHYA])
    raise ConfigError(f"sdlora cannot translate the command line of {script}. It knows those of {known}.")
