"""Files that lie or would run something: LoRA files, pickles, bases, and whatever text a fuzzer makes up."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.promises import Figure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sdlora.config.toml import load_config, parse_config
from sdlora.data.captions import read_captions
from sdlora.errors import BaseModelError, ConfigError, DataError, SdloraError
from sdlora.lora_files.read import describe_lora
from sdlora.models.load import load_base

PACKAGE = Path(__file__).parents[2] / "sdlora"
MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
DOWN, UP, ALPHA = (f"{MODULE}.{kind}" for kind in ("lora_down.weight", "lora_up.weight", "alpha"))


def lora(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    whole = {DOWN: torch.ones(2, 8), UP: torch.ones(8, 2), ALPHA: torch.tensor(2.0)}
    return {key: value for key, value in (whole | changes).items() if value is not None}


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def hostile() -> dict[str, bytes]:
    whole = save(lora())
    return {
        "empty": b"",
        "seven bytes": bytes(7),
        "no header": struct.pack("<Q", 0),
        "header of 2**63": raw({}, length=2**63),
        "header longer than the file": raw({}, length=1000),
        "cut in its header": whole[:40],
        "cut in its numbers": whole[:-9],
        "more than it says": whole + bytes(64),
        "no JSON": raw(b"<html><script>alert(1)</script></html>"),
        "a list": raw([1, 2, 3]),
        "nested too deeply": raw(b"[" * 200_000),
        "metadata of numbers": raw({"__metadata__": {"a": 1}}),
        "overlapping": raw({DOWN: entry(0, 64, [2, 8]), UP: entry(32, 96, [8, 2])}, bytes(96)),
        "beyond the end": raw({DOWN: entry(0, 1 << 40, [1 << 19, 1 << 19])}, bytes(64)),
        "of no known kind": raw({DOWN: entry(0, 64, [2, 8], "X99")}, bytes(64)),
        "an impossible shape": raw({DOWN: entry(0, 64, [1 << 62, 1 << 62])}, bytes(64)),
        "NaN": save(lora(**{DOWN: torch.full((2, 8), float("nan"))})),
        "infinity": save(lora(**{UP: torch.full((8, 2), float("inf"))})),
        "whole numbers": save(lora(**{DOWN: torch.ones(2, 8, dtype=torch.int64)})),
        "half a module": save(lora(**{UP: None})),
        "shapes that do not pair": save(lora(**{UP: torch.ones(8, 3)})),
        "a way out in its name": save(lora() | {"../../../../tmp/x.lora_down.weight": torch.ones(2, 2)}),
        "no tensors": save({}, metadata={"format": "pt"}),
    }  # fmt: skip


def test_hostile_safetensors_are_refused_in_words(tmp_path: Path, figure: Figure) -> None:
    files = hostile()
    assert len(files) >= 22
    for name, content in files.items():
        path = tmp_path / "run" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            describe_lora(path)
        assert len(str(caught.value)) < 1000, name
        path.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    figure("Hostile LoRA files", f"{len(files)} of {len(files)} refused")


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_pickles_are_never_opened(tiny_base: Path, tmp_path: Path, figure: Figure) -> None:
    mark = tmp_path / "executed"
    trap = pickle.dumps(Trap(mark))
    pickle.loads(trap)
    assert mark.exists(), "the trap works"
    mark.rmdir()
    for suffix in (".ckpt", ".pt", ".bin", ".pkl", ".safetensors"):
        file = tmp_path / f"lora{suffix}"
        torch.save(Trap(mark), file) if suffix == ".pt" else file.write_bytes(trap)
        with pytest.raises(DataError) as caught:
            describe_lora(file)
        assert suffix == ".safetensors" or "convert it" in str(caught.value)
        with pytest.raises(BaseModelError):
            load_base(str(file), device=torch.device("cpu"), dtype=torch.float32)
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Trap(mark), base / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError):
        load_base(str(base), device=torch.device("cpu"), dtype=torch.float32)
    assert not mark.exists()
    figure("Pickles", "none of 6 opened")


def test_code_that_comes_with_a_base_is_not_run(tiny_base: Path, tmp_path: Path, figure: Figure) -> None:
    mark = tmp_path / "executed"
    code = f"import os; os.mkdir({str(mark)!r})\nclass Evil: pass\n"

    def change(file: Path, **values: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def network(base: Path) -> None:
        change(base / "model_index.json", unet=["evil", "Evil"])

    def pipeline(base: Path) -> None:
        change(base / "model_index.json", _class_name=["evil", "Evil"])

    def words(base: Path) -> None:
        change(base / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"}, model_type="evil")

    def tokens(base: Path) -> None:
        change(base / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})

    for number, trick in enumerate((network, pipeline, words, tokens)):
        base = tmp_path / str(number)
        shutil.copytree(tiny_base, base)
        for folder in (base, base / "unet", base / "text_encoder", base / "tokenizer"):
            for name in ("evil.py", "pipeline.py"):
                (folder / name).write_text(code)
        trick(base)
        try:
            load_base(str(base), device=torch.device("cpu"), dtype=torch.float32)
        except BaseModelError as error:
            assert trick in (network, pipeline), error
        assert not mark.exists(), trick.__name__
    figure("Code in a base", "none of 4 run; no call in the source that could")


# TorchScript is a program: the one file that is one is run only if its hash is the published one.
MAY_LOAD_PROGRAMS = {"copycheck/embedders.py"}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "system", "popen", "loads_pickle"}


def test_the_source_runs_no_text_and_no_shell() -> None:
    faults = []
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            faults += [f"{name} imports {module}" for module in imported if module in ("pickle", "marshal", "shelve")]
            if not isinstance(node, ast.Call):
                continue
            function, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            last = function.rpartition(".")[2]
            # re.compile and module.eval() are other things of the same names.
            builtin = function == last or function.startswith(("os.", "subprocess."))
            if last in FORBIDDEN and builtin:
                faults.append(f"{name}:{node.lineno} calls {function}")
            if function.startswith("subprocess.") and node.args and not isinstance(node.args[0], ast.List | ast.Name):
                faults.append(f"{name}:{node.lineno} calls {function} with something else than a list")
            if words.get("shell") == "True" or words.get("trust_remote_code", "False") != "False":
                faults.append(f"{name}:{node.lineno} calls {function} with {words}")
            if function == "torch.load" and words.get("weights_only") != "True":
                faults.append(f"{name}:{node.lineno} unpickles")
            if function == "torch.jit.load" and name not in MAY_LOAD_PROGRAMS:
                faults.append(f"{name}:{node.lineno} loads a program")
    assert not faults, "\n".join(faults)


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LINES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", errors="surrogatepass")),
    st.dictionaries(
        st.sampled_from(["file_name", "text", "x"]), st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text()))
    ).map(lambda value: json.dumps(value).encode()),
    st.integers(1, 100_000).map(lambda depth: b"[" * depth),
    st.just(b'{"file_name": "a.png", "text": "\\ud800"}'),
)


@FUZZ
@given(content=st.lists(LINES, max_size=4).map(b"\n".join))
def test_any_captions_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("set")
    (folder / "metadata.jsonl").write_bytes(content)
    (folder / "a.txt").write_bytes(content)
    found = read_captions(folder, ["a.png"])
    assert found.by_image.keys() == {"a.png"}
    for file, text in found.by_image["a.png"].items():
        assert file in ("metadata.jsonl", "a.txt")
        assert text.encode() == text.strip().encode()
    assert all(file in ("metadata.jsonl", "a.txt") for file, _ in found.faults)
    shutil.rmtree(folder)


TOML = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", errors="surrogatepass")),
    st.integers(1, 100_000).map(lambda depth: b"a = " + b"[" * depth),
    st.tuples(st.sampled_from(["seed", "name", "data.folder", "lora.rank", "train.epochs", "data"]), st.text()).map(
        lambda pair: f"{pair[0]} = {json.dumps(pair[1])}".encode()
    ),
)


@FUZZ
@given(content=st.lists(TOML, max_size=4).map(b"\n".join), override=st.text(max_size=60))
def test_any_configuration_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, override: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "x.toml"
    path.write_bytes(content)
    for overrides in ([], [override], [f"data.trigger={override}"]):
        try:
            load_config(str(path), overrides)
        except ConfigError as error:
            assert str(error)
    path.unlink()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=10,
)


@FUZZ
@given(document=st.dictionaries(st.sampled_from(["seed", "base", "data", "lora", "train", "name", "other"]), JSON))
def test_any_table_is_a_configuration_or_refused(document: dict[str, Any]) -> None:
    try:
        parse_config(document, name="x")
    except ConfigError as error:
        assert str(error)


SHAPES = st.lists(st.integers(-2, 2**64), max_size=3)
OFFSETS = st.lists(st.integers(-1, 2**64), max_size=3)
ENTRIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F16", "I64", "X"]), "shape": SHAPES, "data_offsets": OFFSETS}
    ),
)


@FUZZ
@given(
    header=st.one_of(JSON, st.dictionaries(st.sampled_from([DOWN, UP, "__metadata__", "../x"]), ENTRIES)),
    body=st.binary(max_size=64),
)
def test_any_header_of_safetensors_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, body: bytes
) -> None:
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    path.write_bytes(raw(header, body))
    try:
        describe_lora(path)
    except SdloraError as error:
        assert str(error)
    path.unlink()
