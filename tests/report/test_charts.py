import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from sdlora.report.charts import Line, Point, bar_chart, line_chart, log_ticks, scatter_chart, spread, ticks


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def points(chart: str) -> list[list[tuple[float, float]]]:
    found = [line.get("points", "") for line in parsed(chart).iter("polyline")]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in found]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.03, 0, [-0.03, -0.02, -0.01, 0]),
        (1, 230, [50, 100, 150, 200]),
    ],
)  # fmt: skip
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_ticks_of_ratios_are_few_round_and_inside() -> None:
    assert log_ticks(0.009, 0.6) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    assert log_ticks(1e-5, 1.0) == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
    assert log_ticks(0.031, 0.036) == [0.031, 0.032, 0.033, 0.034, 0.035, 0.036]


def test_a_line_is_where_its_values_are() -> None:
    ((first, second, third),) = points(
        line_chart([Line("a", [4.0, 2.0, 0.0], "#000")], [1, 2, 3], x_name="x", y_name="y")
    )
    assert first[0] < second[0] < third[0]
    assert second[1] - first[1] == pytest.approx(third[1] - second[1], abs=0.11)
    chart = line_chart([Line("a", [0.4, 0.2, 0.1], "#000")], [1, 2, 3], x_name="x", y_name="y", log=True)
    ((first, second, third),) = points(chart)
    assert second[1] - first[1] == pytest.approx(third[1] - second[1], abs=0.11)


def test_missing_values_and_nothing_at_all() -> None:
    lines = [Line("a", [None, 1.0, None], "#000"), Line("b", [None, None, None], "#000")]
    chart = line_chart(lines, [0, 1, 2], x_name="epoch", y_name="loss")
    assert len(points(chart)) == 1 == chart.count("<circle")
    assert ">a<" in chart and ">b<" not in chart
    assert line_chart([Line("a", [None], "#000")], [0], x_name="x", y_name="y") == ""
    assert math.isfinite(points(line_chart([Line("a", [0.0], "#000")], [0], x_name="x", y_name="y"))[0][0][1])


def test_labels_never_overlap_and_stay_inside() -> None:
    placed = spread([180.0, 100.0, 181.0, 182.0, 101.0])
    for first, second in zip(sorted(placed), sorted(placed)[1:], strict=False):
        assert second - first >= 13
    assert max(placed) <= 182
    assert placed[1] < placed[4] < placed[0] < placed[2] < placed[3]
    assert spread([50.0, 100.0]) == [50.0, 100.0]


def test_bars_have_the_heights_of_their_counts() -> None:
    chart = bar_chart([0, 2, 4], [0, 500, 1000], x_name="timestep", y_name="visits")
    heights = [float(bar.get("height", "")) for bar in parsed(chart).iter("rect")]
    assert heights[0] == 0 and heights[2] == pytest.approx(2 * heights[1], abs=0.11)
    assert [title.text for title in parsed(chart).iter("title")] == ["0", "2", "4"]
    assert re.search(">500<", chart)


def test_names_are_escaped() -> None:
    chart = line_chart([Line("<a&", [1.0], "#000")], [0], x_name="<x", y_name="'y")
    assert "&lt;a&amp;" in chart
    parsed(chart)


def test_points_stand_where_their_values_are_and_labels_apart() -> None:
    found = [
        Point("1", 0.2, 0.5, "#111", joined=True),
        Point("2", 0.6, 0.1, "#222", joined=True),
        Point("3", 0.6, 0.1, "#333"),
    ]
    chart = parsed(scatter_chart(found, x_name="copying", y_name="loss"))
    dots = [(float(dot.get("cx", 0)), float(dot.get("cy", 0)), dot.get("fill")) for dot in chart.iter("circle")]
    assert dots[0][0] < dots[1][0] and dots[0][1] < dots[1][1]  # SVG counts downward
    assert dots[1][:2] == dots[2][:2]
    assert [fill for _, _, fill in dots] == ["#111", "#222", "#fff"]
    (line,) = chart.iter("polyline")
    assert len(str(line.get("points")).split()) == 2
    labels = {t.text: (float(t.get("x", 0)), float(t.get("y", 0))) for t in chart.iter("text") if t.get("fill") in
              ("#111", "#222", "#333")}  # fmt: skip
    assert labels["2"] != labels["3"]


def test_one_point_is_a_chart() -> None:
    chart = parsed(scatter_chart([Point("1", 0.0, 0.0, "#111")], x_name="x", y_name="y"))
    assert len(list(chart.iter("circle"))) == 1 and not list(chart.iter("polyline"))
