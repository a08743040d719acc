"""What a step costs against resolution, batch and rank, and a run against its images: counted by `sdlora plan`.

    python tests/benchmarks/costs.py [--folder docs]

No clock and no weights: arithmetic and bytes follow from shapes. Each curve changes one setting of a run at the
family's own size, batch 1, rank 8 on cross-attention, base in bfloat16, previews off.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
# Names of elements are otherwise drawn by chance, so that the same figures make another file.
matplotlib.rcParams.update({"svg.hashsalt": "sdlora", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})  # fmt: skip
from matplotlib import pyplot  # noqa: E402

from sdlora.common.families import Family  # noqa: E402
from sdlora.config.toml import parse_config  # noqa: E402
from sdlora.estimate.meta_model import shapes_of_family  # noqa: E402
from sdlora.run.estimate import Estimate, estimate_shapes  # noqa: E402

FAMILIES: dict[Family, tuple[str, str]] = {"sd1": ("SD 1.5", "#1d5fd0"), "sdxl": ("SDXL", "#9a4d00")}
SWEEPS: dict[str, dict[Family, tuple[int, ...]]] = {
    "data.resolution_px": {"sd1": (256, 384, 512, 768), "sdxl": (512, 768, 1024)},
    "train.batch_size": {"sd1": (1, 2, 4, 8), "sdxl": (1, 2, 4, 8)},
    "lora.rank": {"sd1": (4, 8, 32, 128), "sdxl": (4, 8, 32, 128)},
}
IMAGES = (10, 20, 50, 100)
EXPOSURES = 40  # of each image: ten repeats in four epochs


def plan(family: Family, *changes: str) -> Estimate:
    """The plan of a family with some settings changed."""
    document = {"data": {"folder": "none"}, "preview": {"enabled": False}}
    config = parse_config(document, name="costs", overrides=list(changes))
    return estimate_shapes(config, shapes_of_family(family), None)


def sweep(option: str, *, counted: Callable[..., Estimate] = plan) -> dict[str, list[tuple[int, float, float]]]:
    """For each family: the setting's value, TFLOP of a step, and the planned peak in GiB."""
    return {
        FAMILIES[family][0]: [
            (value, found.flops_per_step / 1e12, found.peak_bytes / 2**30)
            for value in values
            for found in [counted(family, f"{option}={value}")]
        ]
        for family, values in SWEEPS[option].items()
    }


def draw(folder: Path) -> Path:
    """Count everything and draw it; prints the figures as well."""
    figure, axes = pyplot.subplots(2, 4, figsize=(10, 5))
    for column, option in enumerate(SWEEPS, start=1):
        for name, rows in sweep(option).items():
            for value, tflop, gib in rows:
                print(f"{name}, {option} = {value}: {tflop:.2f} TFLOP a step, {gib:.2f} GiB at the peak", flush=True)
            values, tflops, gibs = zip(*rows, strict=True)
            _line(axes[0][column], name, values, tflops)
            _line(axes[1][column], name, values, gibs)
        axes[1][column].set_xlabel(option)
        axes[0][column].set_title("TFLOP a step", fontsize=9)
        axes[1][column].set_title("GiB at the peak", fontsize=9)
    for family, (name, _) in FAMILIES.items():
        found = plan(family)
        each = found.flops_per_step * EXPOSURES / 1e15
        _line(axes[0][0], name, IMAGES, [count * each for count in IMAGES])
        _line(axes[1][0], name, IMAGES, [found.peak_bytes / 2**30] * len(IMAGES))
        print(f"{name}: {each:.3f} PFLOP for every image of a run of {EXPOSURES} exposures", flush=True)
    axes[0][0].set_title(f"PFLOP a run, {EXPOSURES} exposures", fontsize=9)
    axes[1][0].set_title("GiB at the peak", fontsize=9)
    axes[1][0].set_xlabel("pictures")
    axes[0][0].legend(frameon=False)
    # Not before all is drawn: a limit that is set keeps axes from growing.
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    target = folder / "performance_costs.svg"
    figure.savefig(target, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return target


def _line(axis: Any, name: str, x: Any, y: Any) -> None:
    axis.plot(x, y, marker="o", markersize=3, color=dict(FAMILIES.values())[name], label=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/measurements"))
    print(draw(parser.parse_args().folder))


if __name__ == "__main__":
    main()
