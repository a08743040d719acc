"""Hints: one list, in one order, for the estimate, the studio and the message of an out-of-memory error."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from helpers.shapes import memory_inputs

from sdlora.config.toml import FREE_WHEN_RESUMING, options, parse_config
from sdlora.estimate.hints import Stage, hints, hints_to_fit, out_of_memory_message, with_values
from sdlora.estimate.memory import estimate_memory

ORDER = [
    "train.precision", "train.auto_batch", "train.batch_size", "base.quantization", "train.gradient_checkpointing",
    "preview.enabled", "preview.guidance", "base.quantization", "data.resolution_px", "data.resolution_px",
    "lora.rank", "base.offload", "train.device",
]  # fmt: skip


def first_options(found: list[Any]) -> list[str]:
    return [next(iter(hint.values)) for hint in found]


def config_with(**sections: dict[str, Any]) -> Any:
    return parse_config({"data": {"folder": "x"}} | sections, name="x")


def test_hints_are_ordered_from_cheapest_to_dearest() -> None:
    found = hints(config_with(train={"batch_size": 4}), torch.float32, (512, 512))
    assert first_options(found) == ORDER


def test_values_of_hints_are_valid_and_change_their_options() -> None:
    train = {"batch_size": 2, "compile": True}
    config = config_with(train=train)
    for hint in hints(config, torch.float32, (512, 512)):
        assert hint.can_resume == (set(hint.values) <= FREE_WHEN_RESUMING)
        if hint.values == {"base.quantization": "nf4"}:
            continue  # comes on top of int8, whose hint ends compilation
        overrides = [part.replace(" = ", "=") for part in hint.text().split(" and ")]
        parsed = parse_config({"data": {"folder": "x"}, "train": train}, name="x", overrides=overrides)
        before, after = dict(options(config)), dict(options(parsed))
        assert {name for name in after if after[name] != before[name]} == set(hint.values)
        assert dict(options(with_values(config, hint.values))) == after


def test_hints_leave_out_what_is_lowest_already() -> None:
    config = config_with(
        train={"gradient_checkpointing": True, "precision": "bf16", "device": "cpu"}, lora={"rank": 1},
        base={"quantization": "nf4"}, preview={"enabled": False}, data={"folder": "x", "bucket_step_px": 64},
    )  # fmt: skip
    assert hints(config, torch.bfloat16, (64, 64)) == []


def test_hints_are_counted_until_the_run_fits_and_no_further() -> None:
    asked = memory_inputs(batch_size=4)
    needed = estimate_memory(asked)
    assert hints_to_fit(asked, needed, needed.peak_bytes) == []
    (first,) = hints_to_fit(asked, needed, needed.peak_bytes - 1)
    assert (first.change, first.values) == ("train.precision = 'bf16'", {"train.precision": "bf16"})
    assert first.time == 1.0
    everything = hints_to_fit(asked, needed, 1)
    assert [change.change.split(" ")[0] for change in everything][:4] == [
        "train.precision", "train.batch_size", "base.quantization", "train.gradient_checkpointing",
    ]  # fmt: skip
    assert everything[-1].values == {"base.offload": "blocks"}
    assert "in each step" in everything[-1].price
    peaks = [needed.peak_bytes, *(change.peak_bytes for change in everything)]
    assert peaks == sorted(peaks, reverse=True)
    assert everything[2].time == pytest.approx(everything[1].time, rel=0.01)
    assert everything[3].time > 1.2


def test_counted_hints_are_valid_together() -> None:
    asked = memory_inputs(compile=True, batch_size=2)
    everything = hints_to_fit(asked, estimate_memory(asked), 1)
    told = [part for change in everything for part in change.change.split(" and ")]
    assert "train.compile = false" in told
    document = {"data": {"folder": "x"}, "train": {"compile": True}}
    found = parse_config(document, name="x", overrides=[part.replace(" = ", "=") for part in told])
    assert (found.base.quantization, found.train.compile) != ("none", True)


@pytest.mark.parametrize(
    ("stage", "sections", "told"),
    [
        ("load", {"train": {"precision": "fp32"}}, ["train.precision = 'bf16' (now 'fp32'"]),
        ("load", {"train": {"precision": "bf16", "device": "cuda"}}, ["base.quantization = 'int8' (now 'none'"]),
        ("load", {"base": {"quantization": "int8"}}, ["base.quantization = 'nf4' (now 'int8'"]),
        ("load", {"base": {"quantization": "nf4"}}, ["base.offload = 'blocks' (now 'none'"]),
        (
            "load",
            {"base": {"quantization": "nf4", "offload": "blocks"}},
            ["train.device = 'cpu' (now 'auto'"],
        ),
        (
            "train",
            {"train": {"batch_size": 6, "gradient_accumulation_steps": 2}},
            [
                "--resume --set train.auto_batch=true (now false",
                "train.batch_size = 1 and train.gradient_accumulation_steps = 12 (now 6 and 2",
            ],
        ),
        ("train", {}, ["--resume --set train.gradient_checkpointing=true (now false", "base.quantization = 'int8'"]),
        ("train", {"train": {"gradient_checkpointing": True}}, ["data.resolution_px = 384 (now 512"]),
        (
            "train",
            {"train": {"batch_size": 6, "auto_batch": True}},
            ["--resume --set train.gradient_checkpointing=true (now false"],
        ),
        (
            "train",
            {
                "data": {"folder": "x", "resolution_px": 64}, "lora": {"rank": 16},
                "train": {"gradient_checkpointing": True}, "base": {"quantization": "nf4"},
            },
            ["lora.rank = 8 (now 16"],
        ),
        ("cache", {}, ["data.resolution_px = 384 (now 512"]),
        (
            "cache",
            {"data": {"folder": "x", "resolutions_px": [256, 384, 512]}},
            ["data.resolutions_px = [256, 384] (now [256, 384, 512]"],
        ),
        ("export", {}, ["base.quantization = 'int8' (now 'none'"]),
        ("preview", {}, ["--resume --set preview.enabled=false (now true", "preview.guidance = 1.0 (now 7.5"]),
    ],
)  # fmt: skip
def test_out_of_memory_message_names_options_with_old_and_new_values(
    stage: Stage, sections: dict[str, Any], told: list[str]
) -> None:
    message = out_of_memory_message(config_with(**sections), stage, 512)
    assert [part for part in told if part not in message] == []


def test_out_of_memory_message_offers_nothing_that_does_not_help_in_its_stage() -> None:
    config = config_with(train={"batch_size": 4})
    helpful = {"cache": {"data.resolution_px"}, "preview": {"preview.enabled", "preview.guidance"}}
    for stage in get_args(Stage):
        message = out_of_memory_message(config, stage, 512)
        named = {name for name, _ in options(config) if f"{name} = " in message or f"{name}=" in message}
        assert named and named <= helpful.get(stage, named)
        assert ("--resume" in message) == (stage in ("train", "preview"))
