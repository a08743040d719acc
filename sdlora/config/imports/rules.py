"""The kinds of rules that importers' tables are made of, and how a table is applied to another trainer's settings.

Every form's file is a table of keys and rules over this; `detect` chooses the form.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from sdlora.config.schema_data import SetOptions

EMPTY: tuple[Any, ...] = (None, "", [], {})
OFF: tuple[Any, ...] = (*EMPTY, False, 0, "0", "0.0", "false", "False", "none", "None")
SEVERAL = "differs between the sets, and sdlora has one value for all of them"
OF_A_SET = "differs between the sets; give each entry of data.sets its own"


class Status(StrEnum):
    """What became of a key."""

    TRANSLATED = "translated"
    DROPPED = "dropped"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of a value: the options it sets, by dotted name, and a reason or remark."""

    status: Status
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


def translated(options: Mapping[str, Any], remark: str = "") -> Outcome:
    """The value became these options."""
    return Outcome(Status.TRANSLATED, options, remark)


def dropped(reason: str) -> Outcome:
    """The value is not needed: the result is the same without it, or it does not concern the result."""
    return Outcome(Status.DROPPED, reason=reason)


def refused(reason: str, options: Mapping[str, Any] | None = None) -> Outcome:
    """The result would be another one without a word, so that the user must decide; `options` is what carries over."""
    return Outcome(Status.REFUSED, options or {}, reason)


@dataclass(frozen=True)
class Fate:
    """What became of one key: as the file names it, its value, and the outcome; `given` unless it is a default."""

    key: str
    value: Any
    status: Status
    options: Mapping[str, Any]
    reason: str
    given: bool = True


@dataclass
class Source:
    """Another trainer's settings.

    Attributes:
        form: The form's name, for messages.
        values: By key; nested tables have dotted keys.
        rows: Settings that are given once per set of images or per prompt, by the prefix of their keys.
        defaults: The other trainer's own defaults, where ours differ.
        decided: Outcomes that were known when the file was read.
        labels: The names that the file uses, where they differ from the table's.
        always: What the other trainer does without any key.
    """

    form: str
    values: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    decided: dict[str, Outcome] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    always: list[Fate] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, the other trainer's default, or `default`."""
        value = self.values.get(key)
        if value in EMPTY:
            value = self.defaults.get(key)
        return default if value in EMPTY else value

    def column(self, key: str) -> list[Any] | None:
        """The key's value in every row that its prefix names; None if no row has it."""
        found = [prefix for prefix in self.rows if not prefix or key.startswith(f"{prefix}.")]
        prefix = max(found, key=len, default="")
        rows, name = self.rows.get(prefix, []), key.removeprefix(f"{prefix}.") if prefix else key
        if not any(name in row for row in rows):
            return None
        return [row[name] if row.get(name) not in EMPTY else self.defaults.get(key) for row in rows]

    def keys(self) -> list[str]:
        """Every key of the file once."""
        of_rows = [
            f"{prefix}.{name}" if prefix else name for prefix, rows in self.rows.items() for row in rows for name in row
        ]
        return list(dict.fromkeys([*self.values, *of_rows, *self.decided]))


Apply = Callable[[Any, Source], Outcome]


@dataclass(frozen=True)
class Rule:
    """What becomes of a key.

    Attributes:
        apply: From its value and all settings to the outcome; a ValueError means that the value cannot be read.
        summary: For the documentation.
        several: Where rows differ: refuse, take the first, or hand over the list of all values.
        follows: The key whose outcome this one shares.
    """

    apply: Apply
    summary: str
    several: Literal["refuse", "first", "all"] = "refuse"
    follows: str | None = None


def always(what: str, options: Mapping[str, Any]) -> Fate:
    """What another trainer does without any key, as options."""
    return Fate(what, None, Status.TRANSLATED, options, "", given=False)


def rename(
    option: str,
    convert: Callable[[Any], Any] = lambda value: value,
    several: Literal["refuse", "first", "all"] = "refuse",
) -> Rule:
    """The value, converted, is an option's."""
    return Rule(lambda value, source: translated({option: convert(value)}), f"`{option}`", several)


def switch(options: Mapping[str, Any], remark: str = "") -> Rule:
    """Switched on, the key sets options."""
    names = ", ".join(f"`{option}`" for option in options)
    return Rule(lambda value, source: translated(options, remark) if flag(value) else dropped("off"), names)


def drop(reason: str) -> Rule:
    """The key is not needed."""
    return Rule(lambda value, source: dropped(reason), f"dropped: {reason}", several="first")


def refuse(reason: str, off: Sequence[Any] = OFF) -> Rule:
    """The key is refused unless its value is one of `off`, with which nothing differs."""

    def apply(value: Any, source: Source) -> Outcome:
        if value in off:
            return dropped("off" if value in OFF else "the same in sdlora")
        return refused(reason)

    return Rule(apply, f"refused unless off: {reason}")


def compute(apply: Apply, summary: str, several: Literal["refuse", "first", "all"] = "refuse") -> Rule:
    """A function decides."""
    return Rule(apply, summary, several)


def part_of(key: str) -> Rule:
    """The key is read together with another one."""
    return Rule(lambda value, source: dropped(f"has no effect without {key}"), f"read with `{key}`", follows=key)


def keys(names: str, prefix: str = "") -> tuple[str, ...]:
    """Keys from names with blanks between them, below a prefix."""
    return tuple(f"{prefix}.{name}" if prefix else name for name in names.split())


def table(rules: Mapping[str | tuple[str, ...], Rule]) -> dict[str, Rule]:
    """A table with several keys per rule, by single key."""
    return {key: rule for keys, rule in rules.items() for key in ((keys,) if isinstance(keys, str) else keys)}


@dataclass(frozen=True)
class Imported:
    """A translated configuration: nested tables that `parse_config` accepts, and what became of every key."""

    form: str
    document: dict[str, Any]
    fates: tuple[Fate, ...]

    @property
    def open_keys(self) -> list[str]:
        """The keys that are refused or unknown, for which the user must decide."""
        return [fate.key for fate in self.fates if fate.status in (Status.REFUSED, Status.UNKNOWN)]


def translate(source: Source, rules: Mapping[str, Rule]) -> list[Fate]:
    """What becomes of every key of a file and of every default of the other trainer, in the table's order."""
    given = dict.fromkeys(source.keys())
    outcomes: dict[str, tuple[Any, Outcome]] = {}
    for key, rule in rules.items():
        if key in given or key in source.defaults:
            value, outcome = _apply(key, rule, source)
            if key in given or outcome.status is not Status.DROPPED:
                outcomes[key] = value, outcome
    for key, rule in rules.items():
        main = outcomes[str(rule.follows)][1] if rule.follows in outcomes else None
        used = key in outcomes and outcomes[key][1].reason != "not set"
        if main is not None and main.status is not Status.DROPPED and used:
            label = source.labels.get(str(rule.follows), rule.follows)
            outcomes[key] = outcomes[key][0], Outcome(main.status, reason=f"see {label}")
    for key in given:
        if key not in outcomes:
            near = difflib.get_close_matches(key, rules, n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]}?" if near else ""
            unknown = Outcome(Status.UNKNOWN, reason=f"not a key of {source.form} that sdlora knows{hint}")
            value = source.values.get(key)
            outcomes[key] = value, source.decided.get(key, dropped("empty") if value == {} else unknown)
    return source.always + [
        Fate(source.labels.get(key, key), value, outcome.status, outcome.options, outcome.reason, key in given)
        for key, (value, outcome) in outcomes.items()
    ]


def _apply(key: str, rule: Rule, source: Source) -> tuple[Any, Outcome]:
    """The value of a key, and the outcome of its rule."""
    if key in source.decided:
        return source.values.get(key), source.decided[key]
    column = source.column(key)
    if column is None:
        value = source.get(key)
        return value, dropped("not set") if value is None else _one(rule, value, source)
    if rule.several == "all":
        return column, _one(rule, column, source)
    found = [value for value in column if value not in EMPTY]
    value = found[0] if found else None
    if rule.follows or not found:
        return value, rule.apply(value, source) if found else dropped("not set")
    outcomes = [_one(rule, value, source) for value in column if value not in EMPTY]
    worst = next((one for one in outcomes if one.status is Status.REFUSED), outcomes[0])
    same = all(one.options == worst.options for one in outcomes)
    if worst.status is Status.REFUSED or (same and (not worst.options or len(outcomes) == len(column))):
        return value, worst
    if rule.several == "first":
        return value, worst if same else replace(worst, reason="differs between the prompts; the first one is taken")
    own = {f"data.{name}" for name in SetOptions.model_fields} | {"data.resolution_px"}
    return column, refused(OF_A_SET if worst.options and own.issuperset(worst.options) else SEVERAL)


def _one(rule: Rule, value: Any, source: Source) -> Outcome:
    try:
        return rule.apply(value, source)
    except ValueError as error:
        return refused(f"cannot be read: {error}")


def flatten(document: Mapping[str, Any], opaque: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys; tables whose key is in `opaque` stay values."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in opaque:
            found |= flatten(value, opaque, f"{name}.")
        else:
            found[name] = value
    return found


def number(value: Any) -> float:
    """A finite number, also from text; an int where it is whole.

    Raises:
        ValueError: It is not one.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number") from None
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError(f"{value!r} is not a number")
    return int(found) if found.is_integer() and abs(found) < 2**63 else found


def whole(value: Any) -> int:
    """A whole number, also from text.

    Raises:
        ValueError: It is not one.
    """
    found = number(value)
    if not isinstance(found, int):
        raise ValueError(f"{value!r} is not a whole number")
    return found


def flag(value: Any) -> bool:
    """A switch, also from text.

    Raises:
        ValueError: It is neither on nor off.
    """
    text = str(value).lower()
    if text in ("true", "1", "1.0", "yes", "on"):
        return True
    if text in ("false", "0", "0.0", "no", "off", "none", ""):
        return False
    raise ValueError(f"{value!r} is neither true nor false")


def text(value: Any) -> str:
    """A text of one value.

    Raises:
        ValueError: It is a list or a table.
    """
    if isinstance(value, list | dict):
        raise ValueError(f"{value!r} is not a text")
    return str(value)


def pairs(value: Any) -> dict[str, str]:
    """Arguments of the form "name=value", in a list or in one text.

    Raises:
        ValueError: An argument has another form.
    """
    words = [str(word) for word in value] if isinstance(value, list) else shlex.split(text(value))
    found = [word.strip().partition("=") for word in words if word.strip()]
    if wrong := [name for name, separator, _ in found if not separator]:
        raise ValueError(f"{wrong[0]!r} is not of the form name=value")
    return {name: content.strip("\"'") for name, _, content in found}


def arguments(words: list[str]) -> dict[str, Any]:
    """A command line's arguments by name without dashes: True for switches, a list for several values."""
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, separator, value = word[2:].partition("=")
            found[name] = [value] if separator else []
        elif name is not None:
            found[name].append(word)
    return {key: {0: True, 1: (value or [None])[0]}.get(len(value), value) for key, value in found.items()}
