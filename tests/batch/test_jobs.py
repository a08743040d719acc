"""Files of jobs: what they become, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file

from sdlora.batch import jobs as jobs_module
from sdlora.batch.batch import _fingerprinted, decide
from sdlora.batch.jobs import Fingerprints, Job, base_content, read_jobs
from sdlora.batch.location import Record
from sdlora.config.toml import parse_config
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
        ("\ufeff[default]\nconfig = 'x'", "default: Extra inputs"),
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


def of(folder: Path, overrides: Sequence[str] = ()) -> str:
    return Fingerprints().of(parse_config({"data": {"folder": str(folder)}}, name="x", overrides=overrides))


def test_settings_images_captions_and_version_change_it(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    before = of(mine)
    assert of(mine) == before
    assert of(mine, ["lora.rank=3"]) != before
    assert of(mine, ["cache.dir=elsewhere", "train.log_every_steps=3"]) == before
    (mine / "notes.md").write_text("no part of the set")
    assert of(mine) == before
    (mine / "red.txt").write_text("a red ball!")
    changed = of(mine)
    assert changed != before
    (mine / "red.png").write_bytes((mine / "blue.png").read_bytes())
    assert of(mine) not in (before, changed)
    shutil.rmtree(mine)
    assert of(mine) not in (before, changed)
    shutil.copytree(images, mine)
    assert of(mine) == before
    monkeypatch.setattr(jobs_module, "__version__", "0.0.0")
    assert of(mine) != before


def test_validation_images_change_it(tmp_path: Path, images: Path, others: Path) -> None:
    held = tmp_path / "held"
    shutil.copytree(others, held)
    before = of(images, [f"data.validation_folder={held}"])
    (held / "pink.txt").write_text("another")
    assert of(images, [f"data.validation_folder={held}"]) != before


def test_content_of_the_base_changes_it(tmp_path: Path, images: Path, tiny_base: Path) -> None:
    base, unet = tmp_path / "base", tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny_base, base)
    setting = [f"base.path={base}"]
    before = of(images, setting)
    shutil.rmtree(base)
    shutil.copytree(tiny_base, base)
    assert of(images, setting) == before  # whatever the files' times
    tensors = load_file(unet)
    save_file({key: tensor + 1e-3 for key, tensor in tensors.items()}, unet)
    changed = of(images, setting)
    assert changed != before
    # So a batch trains its job anew instead of skipping it.
    job = Job("a", 0, {}, parse_config({"data": {"folder": str(images)}}, name="a", overrides=setting))
    assert decide(job, Record("done", before), changed, retry=False)[0] == "start"
    assert decide(job, Record("done", changed), changed, retry=False)[0] == "skip"
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    assert of(images, setting) not in (before, changed)


@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_large_base_is_sampled_from_end_to_end(tmp_path: Path, where: str) -> None:
    file = tmp_path / "base.safetensors"
    numbers = torch.randn(1 << 20)
    save_file({"weight": numbers}, file)
    before = base_content(str(file))
    assert base_content(str(file)) == before
    if where == "middle":
        numbers[1 << 18 : 1 << 19] += 1e-3  # a quarter of the weights, such as one network of a checkpoint
    else:
        numbers[0 if where == "first" else -1] += 1
    save_file({"weight": numbers}, file)
    assert base_content(str(file)) != before


def test_job_with_missing_images_stops_no_other(images: Path) -> None:
    folders = ["memory://there/is/nothing", "builtin:none", "none://is/no/store", str(images)]
    configs = [parse_config({"data": {"folder": folder}}, name="x") for folder in folders]
    *missing, whole = _fingerprinted([Job(str(n), 0, {}, config) for n, config in enumerate(configs)])
    assert [found for _, found in missing] == ["no such set"] * 3
    assert whole[1] == of(images)


def test_unreachable_store_restarts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: 1 / 0)
    config = parse_config({"data": {"folder": "memory://bucket/set"}}, name="x")
    ((job, found),) = _fingerprinted([Job("a", 0, {}, config)])
    action, record = decide(job, Record("done", "as before", epoch=2), found, retry=True)
    assert (action, record.status, record.outcome[0]) == ("fault", "done", "failed")
    assert record.fault is not None and "memory://bucket/set" in record.fault


def test_every_set_changes_it(tmp_path: Path, images: Path, others: Path) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(others, changing)
    config = parse_config({"data": {"sets": [{"folder": str(images)}, {"folder": str(changing)}]}}, name="x")
    before = Fingerprints().of(config)
    assert Fingerprints().of(config) == before
    (changing / "pink.txt").write_text("another")
    assert Fingerprints().of(config) != before
