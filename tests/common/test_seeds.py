import hashlib
import subprocess
import sys

import torch

from sdlora.common import seeds


def test_draw_is_the_same_in_another_process() -> None:
    code = "from sdlora.common import seeds; print(seeds.derive(7, 'noise', 'a.png', 3), seeds.uniform(7, 'x', 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert other == [str(seeds.derive(7, "noise", "a.png", 3)), str(seeds.uniform(7, "x", 1))]


def test_every_counter_and_its_type_changes_the_draw() -> None:
    drawn = {
        seeds.derive(0, "a", 1, 2), seeds.derive(1, "a", 1, 2), seeds.derive(0, "b", 1, 2), seeds.derive(0, "a", 2, 1),
        seeds.derive(0, "a", 12), seeds.derive(0, "a", "1", 2), seeds.derive(0, "a", 1), seeds.derive(0, "a1", 2),
    }  # fmt: skip
    assert len(drawn) == 8


def test_draws_are_those_of_earlier_versions() -> None:
    """Runs of earlier versions resume, so that no draw may change: the digest of its parts between unit separators."""
    parts = "7\x1fnoise\x1fstr:a.png\x1fint:3"
    digest = hashlib.blake2b(parts.encode(), digest_size=8).digest()
    assert seeds.derive(7, "noise", "a.png", 3) == int.from_bytes(digest, "little") >> 1 == 1908735185104504268


def test_global_generators_are_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seeds.normal((4,), 0, "noise")
    seeds.permutation(9, 0, "order")
    assert torch.equal(torch.rand(3), expected)


def test_distributions() -> None:
    values = torch.tensor([seeds.uniform(0, "u", i) for i in range(4000)])
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    drawn = seeds.normal((4000,), 0, "n")
    assert abs(drawn.mean()) < 0.06 and abs(drawn.std() - 1) < 0.05
    assert sorted(seeds.permutation(50, 0, "p")) == list(range(50))
