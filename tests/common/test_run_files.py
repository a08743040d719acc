from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.metrics import epoch, step, write_metrics

from sdlora.common.run_files import LOSS_DECAY, LossSmoother, Metrics, RunState, read_metrics, read_state
from sdlora.errors import OutputError
from sdlora.events import to_json

EVENTS = [epoch(0, validation_loss=0.3), step(1, ["a.png"], [7]), epoch(1, train_loss=0.1, validation_bands=[0.1] * 5)]


def test_written_events_are_read_back(tmp_path: Path) -> None:
    write_metrics(tmp_path / "m", EVENTS)
    assert read_metrics(tmp_path / "m") == Metrics([EVENTS[1]], [EVENTS[0], EVENTS[2]])  # type: ignore[list-item]
    assert read_metrics(tmp_path / "m").validation_losses() == {0: 0.3}


def test_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "m") == Metrics()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_unicode_line_separator_in_a_name_does_not_end_a_line(tmp_path: Path, separator: str) -> None:
    name = f"a{separator}b.png"
    write_metrics(tmp_path / "m", [step(1, [name], [7]), step(2, ["c.png"], [7])])
    assert [event.examples for event in read_metrics(tmp_path / "m").steps] == [[name], ["c.png"]]


@pytest.mark.parametrize("torn", [b'{"event": "step", "epo', '{"event": "step", "examples": ["ä'.encode()[:-1]])
def test_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    write_metrics(tmp_path / "m", EVENTS)
    with (tmp_path / "m").open("ab") as handle:
        handle.write(torn)
    assert len(read_metrics(tmp_path / "m").steps) == 1


@pytest.mark.parametrize("line", ["{", "[]", '"step"', "{}", '{"event": "step"}'])
def test_broken_line_is_named(tmp_path: Path, line: str) -> None:
    write_metrics(tmp_path / "m", EVENTS[:1])
    with (tmp_path / "m").open("a") as handle:
        handle.write(f"{line}\n")
    with pytest.raises(OutputError, match="m, line 2 "):
        read_metrics(tmp_path / "m")


def test_metrics_of_the_first_version_are_read(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(
        '{"event": "epoch", "epoch": 0, "step": 0, "train_loss": null, "heldout_loss": 0.5, "seconds": 1.0}\n'
        '{"event": "step", "epoch": 1, "step": 1, "loss": 0.2, "lr": 0.001, "examples": ["a.png"], "visits": [3], '
        '"timesteps": [9], "losses": [0.2], "seconds": 0.1}\n'
    )
    found = read_metrics(tmp_path / "m")
    assert (found.epochs[0].validation_loss, found.epochs[0].train_bands) == (0.5, None)
    assert found.steps[0].exposures == [3]


def test_smoothed_loss_is_the_weighted_mean_of_all_losses() -> None:
    losses = [3.0, 1.0, 2.0, 5.0]
    smoother = LossSmoother()
    assert smoother.add(losses[0]) == pytest.approx(3.0)
    smoothed = [smoother.add(loss) for loss in losses[1:]][-1]
    weights = [LOSS_DECAY ** (len(losses) - 1 - index) for index in range(len(losses))]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert smoothed == pytest.approx(expected)


def test_written_state_is_read_back(tmp_path: Path) -> None:
    state = RunState(status="failed", phase="train", step=3, total_steps=9, pid=7, started="2026-01-01T00:00:00+0000")
    (tmp_path / "s").write_text(json.dumps(to_json(state)))
    assert read_state(tmp_path / "s") == state


def test_keys_in_the_file_stay_as_they_are() -> None:
    assert list(to_json(RunState(pid=7, started=""))) == [
        "status", "phase", "epoch", "step", "total_steps", "done", "total", "eta_seconds", "pid", "started", "error",
        "closing_seconds",
    ]  # fmt: skip


def test_state_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = to_json(RunState(status="done", pid=7, started="")) | {"unknown": 1}
    del old["closing_seconds"]
    (tmp_path / "s").write_text(json.dumps(old))
    found = read_state(tmp_path / "s")
    assert found is not None and (found.status, found.closing_seconds) == ("done", None)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "{}"])
def test_missing_or_foreign_file_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "s").write_text(content)
    assert read_state(tmp_path / "s") is None
