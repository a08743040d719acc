from __future__ import annotations

import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from sdlora.copycheck import embedders
from sdlora.copycheck.embedders import (
    DINOV2,
    MEAN,
    SSCD,
    STD,
    Published,
    concept_fidelity,
    copy_cosines,
    load_dinov2,
    load_embedders,
    load_sscd,
)
from sdlora.errors import EmbedderError

CPU = torch.device("cpu")
SHAPES = [(300, 201), (64, 64), (90, 500), (257, 256), (1000, 30)]


def noisy(seed: int, size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def published_in(folder: Path, published: Published) -> Published:
    """The published network with the files of this folder."""
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    return replace(published, source=str(folder), sha256=hashes)


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Published:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56)
    Dinov2Model(config).save_pretrained(folder)
    return published_in(folder, DINOV2)


class TinySscd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 16, stride=16)
        self.last = nn.Linear(4 * 20 * 20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.last(self.first(x).relu().flatten(1)))


@pytest.fixture(scope="module")
def sscd_network() -> TinySscd:
    torch.manual_seed(0)
    return TinySscd().eval()


@pytest.fixture(scope="module")
def tiny_sscd(tmp_path_factory: pytest.TempPathFactory, sscd_network: TinySscd) -> Published:
    folder = tmp_path_factory.mktemp("sscd")
    torch.jit.script(sscd_network).save(str(folder / next(iter(SSCD.sha256))))
    return published_in(folder, SSCD)


def test_dinov2_preprocessing_equals_its_own_processor(tiny_dinov2: Published) -> None:
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=MEAN, image_std=STD
    )
    images = [noisy(seed, size, mode) for seed, size in enumerate(SHAPES) for mode in ("RGB", "L")]
    model = Dinov2Model.from_pretrained(tiny_dinov2.source).eval()
    with torch.no_grad():
        theirs = model(processor(images, return_tensors="pt")["pixel_values"]).last_hidden_state[:, 0]
    found = load_dinov2(tiny_dinov2, device=CPU).embed(images)
    torch.testing.assert_close(found, theirs / theirs.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def test_concept_fidelity_is_the_mean_cosine(tiny_dinov2: Published) -> None:
    dinov2 = load_dinov2(tiny_dinov2, device=CPU)
    previews, images = [noisy(seed) for seed in range(3)], [noisy(seed) for seed in range(10, 15)]
    one, other = (dinov2.embed(each).double().numpy() for each in (previews, images))
    expected = sum(float(a @ b) for a in one for b in other) / 15
    assert concept_fidelity(dinov2, previews, images) == pytest.approx(expected, abs=1e-6)
    assert concept_fidelity(dinov2, previews[:1], previews[:1]) == pytest.approx(1.0, abs=1e-6)


def test_sscd_preprocessing_resizes_to_squares(tiny_sscd: Published, sscd_network: TinySscd) -> None:
    images = [Image.new("RGB", size, (200, 100, 50)) for size in SHAPES]
    colour = [(value / 255 - mean) / std for value, mean, std in zip((200, 100, 50), MEAN, STD, strict=True)]
    square = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 320, 320)
    with torch.no_grad():
        expected = sscd_network(square).expand(len(SHAPES), -1)
    torch.testing.assert_close(load_sscd(tiny_sscd, device=CPU).embed(images), expected, atol=1e-6, rtol=0)


def test_copy_cosines_find_mirrored_copies(tiny_sscd: Published, sscd_network: TinySscd) -> None:
    gallery = [noisy(seed) for seed in range(9)]
    images = [gallery[4], ImageOps.mirror(gallery[7]), noisy(50)]
    scores = copy_cosines(load_sscd(tiny_sscd, device=CPU), images, gallery)
    assert scores.shape == (3, 9)
    assert scores.dtype == torch.float32
    assert scores[:2].argmax(dim=1).tolist() == [4, 7]
    assert scores[[0, 1], [4, 7]].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    with torch.no_grad():
        pixels = [
            torch.tensor(np.asarray(p.resize((320, 320), Image.Resampling.BILINEAR))).double() / 255
            for p in (images[2], ImageOps.mirror(images[2]), *gallery)
        ]
        rows = torch.stack([(p - torch.tensor(MEAN)) / torch.tensor(STD) for p in pixels]).permute(0, 3, 1, 2)
        plain, mirrored, *known = sscd_network(rows.float()).double()
    expected = [max(float(plain @ each), float(mirrored @ each)) for each in known]
    assert scores[2].tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        copy_cosines(load_sscd(tiny_sscd, device=CPU), [], gallery)


def test_file_with_another_hash_is_refused(tiny_sscd: Published, tiny_dinov2: Published, tmp_path: Path) -> None:
    name = next(iter(tiny_sscd.sha256))
    with pytest.raises(EmbedderError, match=r"copycheck\.sscd.*SSCD.*SHA-256"):
        load_sscd(replace(tiny_sscd, sha256=SSCD.sha256), device=CPU)
    for file in ("config.json", "model.safetensors"):
        with pytest.raises(EmbedderError, match=rf"SHA-256 of .*{file}"):
            load_dinov2(replace(tiny_dinov2, sha256={**tiny_dinov2.sha256, file: "0" * 64}), device=CPU)
    junk = tmp_path / name
    junk.write_bytes(b"no TorchScript")
    with pytest.raises(EmbedderError, match=rf"PyTorch .*{name}"):
        load_sscd(published_in(tmp_path, SSCD), device=CPU)


def test_missing_file_is_reported_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(EmbedderError, match=r"copycheck\.dinov2.*DINOv2.*config\.json"):
        load_dinov2(replace(DINOV2, source=str(tmp_path)), device=CPU)
    with pytest.raises(EmbedderError, match="does not appear to have a file named sscd_disc_mixup") as caught:
        load_sscd(replace(SSCD, source=str(tmp_path)), device=CPU)
    assert "\n" not in str(caught.value)
    assert "HF_HUB_OFFLINE" not in str(caught.value)


def test_missing_parameters_are_refused(tiny_dinov2: Published, tmp_path: Path) -> None:
    shutil.copytree(tiny_dinov2.source, tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EmbedderError, match="1 parameters are missing"):
        load_dinov2(published_in(tmp_path / "other", DINOV2), device=CPU)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def load(published: Published) -> Any:
    return (load_dinov2 if published.name == "DINOv2" else load_sscd)(published, device=CPU)


@pytest.mark.parametrize("published", [DINOV2, SSCD])
@pytest.mark.usefixtures("empty_cache")
def test_offline_mode_is_named_in_the_error(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EmbedderError, match=rf"{published.source}: .*HF_HUB_OFFLINE"):
        load(published)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that serves a folder's files, or the same few bytes for every request."""

    folder: Path | None = None
    as_a_file = False

    def do_HEAD(self) -> None:
        *_, revision, name = self.path.split("/")
        body = b"<html>please log in</html>" if self.folder is None else (self.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.as_a_file or self.folder is not None:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", revision)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(empty_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}".replace("{endpoint}", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield Hub
    server.shutdown()
    server.server_close()


def test_files_are_downloaded_once(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tiny_dinov2: Published, tiny_sscd: Published
) -> None:
    for tiny, published in ((tiny_dinov2, DINOV2), (tiny_sscd, SSCD)):
        wanted = load(tiny).embed([noisy(0)])
        on_the_hub = replace(published, sha256=tiny.sha256)
        monkeypatch.setattr(hub, "folder", Path(tiny.source))
        assert torch.equal(load(on_the_hub).embed([noisy(0)]), wanted)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load(on_the_hub).embed([noisy(0)]), wanted)


@pytest.mark.parametrize("published", [DINOV2, SSCD])
@pytest.mark.parametrize(("as_a_file", "reason"), [(False, "couldn't connect"), (True, "SHA-256")])
def test_unexpected_hub_response_is_reported_on_one_line(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, published: Published, as_a_file: bool, reason: str
) -> None:
    monkeypatch.setattr(hub, "as_a_file", as_a_file)
    with pytest.raises(EmbedderError, match=rf"{published.option}.*{published.name}.*{reason}") as caught:
        load(published)
    assert "\n" not in str(caught.value)


def test_broken_connection_raises_embedder_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_off(*_: Any, **__: Any) -> None:
        raise embedders.httpx.RemoteProtocolError("peer closed connection")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(embedders, "cached_file", breaks_off)
    with pytest.raises(EmbedderError, match="peer closed connection"):
        load(SSCD)


def test_enabled_embedders_are_loaded_and_missing_ones_reported(
    tiny_dinov2: Published, tiny_sscd: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedders, "load_dinov2", lambda *, device: load_dinov2(tiny_dinov2, device=device))
    monkeypatch.setattr(embedders, "load_sscd", lambda *, device: load_sscd(tiny_sscd, device=device))
    none, missing = load_embedders(sscd=False, dinov2=False, device=CPU)
    assert (none.sscd, none.dinov2, missing) == (None, None, [])
    both, missing = load_embedders(sscd=True, dinov2=True, device=CPU)
    assert both.sscd is not None and both.dinov2 is not None and missing == []
    assert both.score_names == ("hp_ms", "phash", "sscd")
    images, gallery = [noisy(1), noisy(2)], [noisy(2), noisy(3), noisy(4)]
    scores = both.scores(images, gallery)
    torch.testing.assert_close(scores[..., :2], none.scores(images, gallery))
    torch.testing.assert_close(scores[..., 2], copy_cosines(both.sscd, images, gallery))

    def absent(*, device: torch.device) -> Any:
        return load_sscd(replace(tiny_sscd, source="nobody/nothing"), device=device)

    monkeypatch.setattr(embedders, "load_sscd", absent)
    some, missing = load_embedders(sscd=True, dinov2=True, device=CPU)
    assert some.sscd is None and some.dinov2 is not None
    assert len(missing) == 1 and "copycheck.sscd" in missing[0]
