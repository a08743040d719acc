from pathlib import Path

import torch
from PIL import Image

from sdlora.models.load import load_base
from sdlora.preview.sampler import PreviewRequest, draw_previews


def test_previews_are_the_pipelines_own_and_touch_no_global_state(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    request = PreviewRequest(("a red cat", "a dog"), (3, 4), "blue", 2, 5.0)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    progress = list(draw_previews(base, request, tmp_path))
    assert torch.equal(torch.rand(2), expected)
    assert progress[-1].done == progress[-1].total == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(request.file_names())
    pipeline = base.fresh_pipeline()
    result = pipeline(
        ["a dog"], negative_prompt=["blue"], num_inference_steps=2, guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(3)],
    )  # fmt: skip
    found = Image.open(tmp_path / "prompt01_seed3.png")
    difference = (torch.tensor(list(found.tobytes())) - torch.tensor(list(result.images[0].tobytes()))).abs().max()
    assert difference <= 1
