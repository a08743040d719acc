"""Taggers of the WD14 family in small: their tags, their files, and what they compute, in numpy."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Name and category number as in the files of such models.
ROWS = [
    ("general", 9), ("sensitive", 9), ("explicit", 9), ("1girl", 0), ("long_hair", 0), ("^_^", 0), ("blue_theme", 0),
    ("red_theme", 0), ("zumi_(series)", 4), ("mizu", 4),
]  # fmt: skip
SIZE_PX = 16
# Of the means of blue, green and red, from 0 to 255, and of nothing: one row a tag.
_FACTORS = np.array(
    [
        [0, 0, 0, 0.5], [0, 0, 0, 1.0], [0, 0, 0, -4], [0, 0, 0, 3], [0, 0.01, 0, -1], [0, 0, 0, -0.2],
        [0.04, 0, -0.04, 0], [-0.04, 0, 0.04, 0], [0, 0, 0, 2], [0, 0, 0, 1],
    ],
    dtype=np.float32,
)  # fmt: skip


def write_tags(folder: Path, rows: list[tuple[str, int]] = ROWS) -> Path:
    """A folder with the tags of a tagger."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tag_id", "name", "category", "count"])
        writer.writerows([index, name, category, 1000 - index] for index, (name, category) in enumerate(rows))
    return folder


def probabilities(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What the tagger of `write_onnx` computes from (S, S, 3) RGB pixels, in double precision."""
    blue_green_red = pixels.reshape(-1, 3).astype(np.float64).mean(0)[::-1]
    return 1 / (1 + np.exp(-(_FACTORS[:, :3] @ blue_green_red + _FACTORS[:, 3])))


def write_onnx(folder: Path, shape: tuple[str | int, ...] = ("batch", SIZE_PX, SIZE_PX, 3)) -> Path:
    """A tagger whose probabilities follow the mean colour, as the graph of a real one stands in its file."""
    from onnx import TensorProto, helper, numpy_helper, save

    axes = [2, 3] if shape[1] == 3 else [1, 2]
    constants = [
        numpy_helper.from_array(np.array(axes, dtype=np.int64), "axes"),
        numpy_helper.from_array(np.ascontiguousarray(_FACTORS[:, :3].T), "weight"),
        numpy_helper.from_array(_FACTORS[:, 3].copy(), "bias"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "weight", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes, "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", len(_FACTORS)])],
        constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    save(model, str(write_tags(folder) / "model.onnx"))
    return folder
