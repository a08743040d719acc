import numpy as np

from sdlora.pocket.pen import Pen, arc, new_canvas, shade, shrink


def drawn(**options: object) -> np.ndarray:
    canvas = new_canvas((255, 255, 255))
    pen = Pen(canvas, (32, 32), 20, (255, 0, 0), outline=None, **options)  # type: ignore[arg-type]
    pen.polygon([(0, -0.5), (1, -0.5), (1, 0.5), (0, 0.5)])
    return np.argwhere(np.asarray(shrink(canvas))[:, :, 1] < 128)


def test_local_coordinates_are_placed_mirrored_and_turned() -> None:
    y, x = drawn().T
    # Edges may fall on either side of a pixel.
    np.testing.assert_allclose((x.min(), x.max(), y.min(), y.max()), (32, 52, 22, 42), atol=1)
    y, x = drawn(mirrored=True).T
    np.testing.assert_allclose((x.min(), x.max(), y.min(), y.max()), (12, 32, 22, 42), atol=1)
    y, x = drawn(angle=np.pi / 2).T
    np.testing.assert_allclose((x.min(), x.max(), y.min(), y.max()), (22, 42, 32, 52), atol=1)


def test_a_pattern_is_laid_over_the_subjects_colour_alone() -> None:
    canvas = new_canvas((255, 255, 255))
    pen = Pen(canvas, (32, 32), 20, (255, 0, 0))
    pen.oval(0, 0, 0.9, 0.9)
    pen.dot(0, 0, 0.5, (0, 0, 255))
    before = np.asarray(canvas).copy()
    pen.paint_pattern("striped")
    changed = np.any(np.asarray(canvas) != before, axis=2)
    assert changed.sum() > 500
    assert not np.any(np.all(before[changed] == (0, 0, 255), axis=1))
    assert not np.any(np.all(before[changed] == (255, 255, 255), axis=1))
    pen.paint_pattern("plain")


def test_shades_and_arcs() -> None:
    assert shade((100, 0, 200), 0.0) == (100, 0, 200)
    assert shade((100, 0, 200), -0.5) == (50, 0, 100)
    assert shade((100, 0, 200), 1.0) == (255, 255, 255)
    points = arc(1, 2, 3, 4, 0, 90, steps=2)
    assert np.allclose(points[0], (4, 2)) and np.allclose(points[-1], (1, 6))
