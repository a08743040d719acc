from pathlib import Path

import torch
from PIL import Image

from sdlora.events import PreviewsDone, Progress
from sdlora.models.load import load_base
from sdlora.previews.sampler import PreviewRequest, contact_sheet, draw_epoch


def test_previews_equal_the_pipelines_images_and_touch_no_global_state(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    request = PreviewRequest(("a red cat", "a dog"), (3, 4), "blue", 2, 5.0)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    *progress, done = draw_epoch(base, request, 2, tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert isinstance(progress[-1], Progress) and progress[-1].done == progress[-1].total == 4
    files = sorted((tmp_path / "previews").iterdir())
    assert [path.name for path in files] == sorted(request.file_names())
    assert isinstance(done, PreviewsDone) and done.epoch == 2 and sorted(done.files) == [str(path) for path in files]
    pipeline = base.fresh_pipeline()
    result = pipeline(
        ["a dog"], negative_prompt=["blue"], num_inference_steps=2, guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(3)],
    )  # fmt: skip
    found = Image.open(tmp_path / "previews" / "prompt01_seed3.png")
    difference = (torch.tensor(list(found.tobytes())) - torch.tensor(list(result.images[0].tobytes()))).abs().max()
    assert difference <= 1


def test_request_lists_captions_first_with_their_kinds() -> None:
    request = PreviewRequest(("zumi in a wood", "zumi at sea"), (3, 4), "", 2, 5.0, num_captions=1)
    assert request.wanted() == [("zumi in a wood", 3), ("zumi in a wood", 4), ("zumi at sea", 3), ("zumi at sea", 4)]
    assert request.kinds() == ["training", "training", "novel", "novel"]


def test_contact_sheet_places_every_preview(tmp_path: Path) -> None:
    colors = {("base", 0): "red", ("base", 1): "lime", ("epoch 1", 0): "blue", ("epoch 1", 1): "yellow"}
    files: dict[str, list[Path]] = {"base": [], "epoch 1": []}
    for (column, row), color in colors.items():
        path = tmp_path / f"{column}{row}.png"
        Image.new("RGB", (64, 64), color).save(path)
        files[column].append(path)
    contact_sheet(
        ["one prompt", "another, which is long enough to need several lines"], list(files.items()), tmp_path / "s.png"
    )
    sheet = Image.open(tmp_path / "s.png").convert("RGB")
    step = 134
    found = [[sheet.getpixel((200 + 64 + c * step, 34 + 64 + r * step)) for c in range(2)] for r in range(2)]
    assert found == [[(255, 0, 0), (0, 0, 255)], [(0, 255, 0), (255, 255, 0)]]
