from pathlib import Path

from PIL import Image

from sdlora.previews.contact_sheet import contact_sheet


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
