import json
from pathlib import Path

from PIL import Image

from sdlora.preview.report import write_report


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    rows = [{"event": "step", "loss": 0.5}, {"event": "step", "loss": 0.25}]
    rows += [{"event": "epoch", "epoch": 1, "train_loss": 0.4, "heldout_loss": None, "seconds": 2.0}]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "c.toml").write_text('caption = "<script>alert(1)</script>"')
    write_report(
        tmp_path / "r.html", title="<b>x", sentences=["Epoch 1 & more."], sheet=tmp_path / "sheet.png",
        metrics=tmp_path / "m.jsonl", config=tmp_path / "c.toml",
    )  # fmt: skip
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;b&gt;x" in page
    assert "Epoch 1 &amp; more." in page
    assert "data:image/png;base64," in page
    assert "http://" not in page and "https://" not in page
    assert "<td>0.40000</td>" in page
    assert page.count("polyline") == 2
