"""Files of jobs: what they become, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.batch.jobs import read_jobs
from sdlora.errors import ConfigError


def jobs(tmp_path: Path, text: str):  # type: ignore[no-untyped-def]
    file = tmp_path / "jobs.toml"
    file.write_text(text, encoding="utf-8")
    return read_jobs(file)


def test_defaults_jobs_and_sweep_grid_are_combined(tmp_path: Path) -> None:
    found = jobs(
        tmp_path,
        """
        [defaults]
        config = "quickstart"
        [defaults.set]
        "train.epochs" = 3
        "lora.alpha" = 2.0
        [[jobs]]
        name = "dog"
        set = { "data.folder" = "sets/dog", lora.alpha = 4.0 }
        [[jobs]]
        name = "cat"
        [sweep]
        "lora.rank" = [4, 8]
        "train.learning_rate" = [1e-3, 2e-4]
        """,
    )
    assert [job.name for job in found] == [
        f"{name}-rank{rank}-learning_rate{rate}"
        for name in ("dog", "cat") for rank in (4, 8) for rate in ("0.001", "0.0002")
    ]  # fmt: skip
    first, last = found[0].config, found[-1].config
    assert first is not None and last is not None
    assert (first.data.sets[0].folder, first.lora.alpha, first.lora.rank, first.train.epochs) == ("sets/dog", 4.0, 4, 3)
    assert (last.data.sets[0].folder, last.lora.alpha, last.lora.rank) == ("builtin:zumi", 2.0, 8)
    assert last.train.learning_rate == 2e-4
    # What the configuration itself holds stays: quickstart's targets.
    assert last.lora.targets == ["cross_attention", "self_attention", "mlp"]
    assert first.name == found[0].name
    assert found[0].swept == {"lora.rank": 4, "train.learning_rate": 1e-3}


def test_sweep_of_combinations_numbers_values_that_are_not_words(tmp_path: Path) -> None:
    found = jobs(
        tmp_path,
        """
        [defaults]
        config = "quickstart"
        [[sweep]]
        "lora.rank" = 4
        "lora.targets" = ["conv", "mlp"]
        [[sweep]]
        lora.rank = 8
        lora.targets = ["cross_attention"]
        """,
    )
    assert [job.name for job in found] == ["quickstart-rank4-targets1", "quickstart-rank8-targets2"]
    assert [job.config.lora.targets for job in found if job.config] == [["conv", "mlp"], ["cross_attention"]]


def test_jobs_are_ordered_by_priority_then_base(tmp_path: Path) -> None:
    entries = [("a", "x", 0), ("b", "y", 0), ("c", "x", 0), ("d", "y", 5)]
    text = "[defaults]\nconfig = 'quickstart'\n" + "".join(
        f"[[jobs]]\nname = '{name}'\npriority = {priority}\nset = {{ 'base.path' = '{base}' }}\n"
        for name, base, priority in entries
    )
    assert [job.name for job in jobs(tmp_path, text)] == ["d", "a", "c", "b"]


def test_fault_of_one_job_is_kept_with_it(tmp_path: Path) -> None:
    text = "[defaults]\nconfig = 'quickstart'\n[[jobs]]\nname = 'a'\nset = { 'lora.rnak' = 4 }\n[[jobs]]\nname = 'b'\n"
    wrong, right = jobs(tmp_path, text)
    assert wrong.config is None and "Did you mean lora.rank?" in (wrong.fault or "")
    assert right.config is not None and right.fault is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[defaults", "not valid TOML"),
        ("[default]\nconfig = 'x'", "default: Extra inputs"),
        ("[[jobs]]\nnme = 'x'", r"jobs\.0\.nme"),
        ("[[jobs]]\nname = 'x'", "no config"),
        ("[defaults]\nconfig='quickstart'\n[[jobs]]\n[[jobs]]", "named quickstart"),
        ("[defaults]\nconfig='quickstart'\n[[jobs]]\nname='../x'", r"\.\./x"),
        ("[defaults]\nconfig='quickstart'\n[sweep]\n'lora.rnak'=[1]", "Did you mean lora.rank?"),
        ("[defaults]\nconfig='quickstart'\nset={'lora.rnak'=1}", "Did you mean lora.rank?"),
        ("[defaults]\nconfig='quickstart'\n[sweep]\n'lora.rank'=4", "sweep"),
    ],
)
def test_invalid_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        jobs(tmp_path, text)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jobs(tmp_path / "none.toml")
