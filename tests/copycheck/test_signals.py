import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.adapters import trained
from PIL import Image
from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.common import seeds
from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.copycheck import signals
from sdlora.copycheck.signals import (
    Signal,
    guidance_norm,
    registered_similarity,
    retrieve,
    seed_collapse,
    self_retrieval,
    train_validation_gap,
)
from sdlora.copycheck.similarity import hp_ms
from sdlora.data.dataset import load_dataset
from sdlora.diffusion.noise import DdpmLevels, PredictionType
from sdlora.models.load import load_base
from sdlora.pocket.architecture import build_scheduler
from sdlora.training.data import TrainingData


def test_signal_is_outside_at_five_percent() -> None:
    assert Signal("a", 1.0, 0.05, "").outside
    assert not Signal("a", 1.0, 0.051, "").outside
    nothing = Signal("a", None, None, "There is none.")
    expected = {"value": None, "p_value": None, "outside": False, "meaning": "There is none."}
    assert json.loads(json.dumps(nothing.to_json())) == expected


# --- Self-retrieval ------------------------------------------------------------------------------------------------


class Guesser:
    """A base whose predicted clean latents are `guess` of a caption's number, a timestep and the noise."""

    def __init__(self, prediction_type: PredictionType, guess: Callable[[int, int, Tensor], Tensor]) -> None:
        self.prediction_type = prediction_type
        self.device = torch.device("cpu")
        self.levels = DdpmLevels(build_scheduler().alphas_cumprod, prediction_type)
        self.guess = guess

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        return moments.chunk(2, dim=1)[0] * 0.5

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor]) -> Tensor:
        predictions = []
        for noisy_one, timestep, number in zip(noisy.double(), timesteps, text["states"], strict=True):
            alpha = self.levels.alphas_cumprod[timestep].double()
            clean = self.guess(int(number), int(timestep), noisy_one / (1 - alpha).sqrt()).double()
            if self.prediction_type == "epsilon":
                predictions.append((noisy_one - alpha.sqrt() * clean) / (1 - alpha).sqrt())
            else:
                predictions.append((alpha.sqrt() * noisy_one - clean) / (1 - alpha).sqrt())
        return torch.stack(predictions).float()


def stub_data(base: Guesser, means: list[Tensor]) -> Any:
    return SimpleNamespace(
        cache=SimpleNamespace(base=base),
        dataset=SimpleNamespace(examples=list(range(len(means)))),
        name=lambda index: f"{index}.png",
        moments=lambda indices: torch.stack([torch.cat([means[i] * 2, torch.zeros_like(means[i])]) for i in indices]),
        text=lambda exposures: {"states": torch.tensor([float(index) for index, _ in exposures])},
    )


def drawn_means(count: int, *shape: int) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)) + 3.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_retrieve_finds_captions_that_predict_their_own_image(prediction_type: PredictionType) -> None:
    means = [*drawn_means(5, 4, 3, 3), *drawn_means(2, 4, 2, 3)]
    leads_to = [0, 1, 4, 3, 2, 5, 5]  # 2 and 4 are swapped, and 6 leads to another image of its shape
    common = torch.stack(means[:5]).mean(dim=0)

    def guess(number: int, timestep: int, noise: Tensor) -> Tensor:
        image = means[leads_to[number]]
        # Neither a low contrast nor the mean image may decide.
        return common + 0.2 * (image - common) if number < 5 else image

    data = stub_data(Guesser(prediction_type, guess), means)
    found = torch.tensor(retrieve(data, range(7), 0)).view(7, 4)
    assert found.all(dim=1).tolist() == [True, True, False, True, False, True, False]
    assert found.any(dim=1).tolist() == found.all(dim=1).tolist()


def test_retrieve_compares_by_the_formula() -> None:
    means = drawn_means(6, 4, 16, 24)
    common = torch.stack(means).double().mean(dim=0)

    def guess(number: int, timestep: int, noise: Tensor) -> Tensor:
        return means[number] + noise * (8.0 if timestep == 800 else 16.0)

    def fields(latents: Tensor) -> Tensor:
        return latents.reshape(4, 8, 2, 8, 3).mean(dim=(2, 4)).flatten()

    data = stub_data(Guesser("epsilon", guess), means)
    expected = []
    for index, timestep, probe in itertools.product((1, 4), (999, 800), range(2)):
        noise = seeds.normal((4, 16, 24), 7, "self-retrieval", f"{index}.png", timestep, probe)
        seen = fields(guess(index, timestep, noise).double() - common)
        cosines = []
        for mean in means:
            other = fields(mean.double() - common)
            cosines.append(float(seen @ other / (seen.norm() * other.norm())))
        expected.append(cosines.index(max(cosines)) == index)
    assert retrieve(data, [1, 4], 7) == expected
    assert len(set(expected)) == 2, "the noise must decide"
    assert retrieve(data, [4], 7) == expected[4:]


def test_duplicate_image_is_found_by_either_caption() -> None:
    first, second = drawn_means(2, 4, 3, 3)
    data = stub_data(Guesser("epsilon", lambda *_: first), [first, second, first.clone()])
    assert all(retrieve(data, [0, 2], 0))
    assert not any(retrieve(data, [1], 0))


def test_retrieve_has_no_side_effects(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    dataset = load_dataset(ImageFolder(str(images)))
    dataset = dataset.with_buckets(32, BucketOptions(8))
    data = TrainingData(dataset, Cache(tmp_path, base), lambda index, _: dataset.examples[index].caption)
    list(data.fill("white"))
    unet: Any = base.network
    adapter = trained(unet)
    unet.train()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    on = retrieve(data, range(5), 0)
    with adapter.disabled():
        off = retrieve(data, range(5), 0)
    assert torch.equal(torch.rand(2), expected)
    assert len(on) == len(off) == 20
    assert on == retrieve(data, range(5), 0)
    assert unet.training
    assert not unet._forward_hooks
    assert all(layer.enabled for layer in adapter.layers.values())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_self_retrieval_is_an_exact_mcnemar_test() -> None:
    on = [True] * 7 + [False] * 2 + [True] * 7
    off = [False] * 7 + [True] + [False] + [True] * 7
    signal = self_retrieval(on, off)
    # Eight differ; seven or more of them fall on one side in 9 of 256 cases.
    assert signal.p_value == pytest.approx(9 / 256)
    assert signal.value == pytest.approx(6 / 16)
    assert "14 of 16" in signal.meaning and signal.meaning.endswith(" 8.")


# --- The gap -------------------------------------------------------------------------------------------------------


def test_train_validation_gap_is_the_difference_of_relative_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    training_off, validation_off = (
        1 + torch.rand(4, 5, 2, generator=generator),
        1 + torch.rand(3, 5, 2, generator=generator),
    )
    training_on, validation_on = training_off - 0.2, validation_off + 0.05
    training_on[:, 3] -= 0.3
    signal = train_validation_gap((training_on, training_off), (validation_on, validation_off))
    everything = torch.cat([training_off, validation_off]).double()
    assert signal.value == pytest.approx((0.2 + 0.3 / 5 + 0.05) / float(everything.mean()), rel=1e-5)
    # All four training images gain more than the three others: one split of 35.
    assert signal.p_value == pytest.approx(1 / 35)
    assert "timesteps 600-799" in signal.meaning
    share = 100 * 0.26 / float(everything.mean())
    assert f"{-share:+.0f}% on training images" in signal.meaning
    back = train_validation_gap((validation_on, validation_off), (training_on, training_off))
    assert back.value == pytest.approx(-signal.value)
    assert back.p_value == 1.0


def test_without_held_out_images_there_is_no_gap() -> None:
    losses = torch.rand(4, 5, 2)
    signal = train_validation_gap((losses, losses), None)
    assert (signal.value, signal.p_value) == (None, None)
    assert "validation images" in signal.meaning


# --- While previews are drawn --------------------------------------------------------------------------------------


def test_guidance_norm_is_relative_to_the_base() -> None:
    training = [[2.0, 6.0], [3.0, 9.0], [4.0, 4.0]], [[1.0, 2.0], [1.0, 3.0], [2.0, 1.0]]
    novel = [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 2.0]]
    signal = guidance_norm(training, novel)
    assert signal.value == pytest.approx((2.5 + 3 + 3) / (1 + 1 + 1.5))
    assert signal.p_value == pytest.approx(1 / 20)
    assert "2.83 times" in signal.meaning
    assert "1.17 times" in signal.meaning
    assert guidance_norm(([], []), ([], [])).value is None


# --- Collapse ------------------------------------------------------------------------------------------------------


def random_images(count: int, seed: int) -> list[Image.Image]:
    values = torch.rand(count, 16, 16, generator=torch.Generator().manual_seed(seed)) * 255
    return [Image.fromarray(value.byte().numpy()).resize((64, 64)) for value in values]


def grid(images: list[Image.Image], num_seeds: int) -> list[list[Image.Image]]:
    return [images[first : first + num_seeds] for first in range(0, len(images), num_seeds)]


def by_hand(images: list[Image.Image], pairs: list[tuple[int, int]]) -> float:
    similarity = hp_ms(images, images)
    return sum(float(similarity[pair]) for pair in pairs) / len(pairs)


def test_seed_collapse_equals_enumeration_of_all_exchanges() -> None:
    on, off = random_images(6, 1), random_images(6, 2)
    on[1] = on[0].rotate(1)  # two seeds of the first prompt
    pairs = [(a, b) for a, b in itertools.permutations(range(6), 2) if a // 2 == b // 2]
    differences = []
    for exchanged in itertools.product((False, True), repeat=6):
        first = [b if swap else a for a, b, swap in zip(on, off, exchanged, strict=True)]
        second = [a if swap else b for a, b, swap in zip(on, off, exchanged, strict=True)]
        differences.append(by_hand(first, pairs) - by_hand(second, pairs))
    signal = seed_collapse(grid(on, 2), grid(off, 2))
    assert signal.value == pytest.approx(differences[0], abs=1e-5)
    assert signal.p_value == pytest.approx(sum(d >= differences[0] - 1e-6 for d in differences) / 64)
    assert f"{by_hand(on, pairs):.2f}" in signal.meaning and f"{by_hand(off, pairs):.2f}" in signal.meaning


def test_seed_collapse_takes_prompts_with_different_numbers_of_seeds() -> None:
    on, off = random_images(5, 1), random_images(5, 2)
    pairs = [
        (a, b) for a, b in itertools.permutations(range(3), 2)
    ]  # the fourth and fifth are alone with their prompts
    ragged = [[on[:3], on[3:4], on[4:]], [off[:3], off[3:4], off[4:]]]
    signal = seed_collapse(*ragged)
    assert signal.value == pytest.approx(by_hand(on, pairs) - by_hand(off, pairs), abs=1e-5)


def test_seed_collapse_of_one_seed_has_no_value() -> None:
    images = grid(random_images(3, 1), 1)
    signal = seed_collapse(images, images)
    assert (signal.value, signal.p_value) == (None, None)
    assert "seeds" in signal.meaning


def test_seed_collapse_keeps_its_false_alarm_rate_for_correlated_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, seeds and both conditions are correlated; only the adapter has no effect."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    monkeypatch.setattr(signals, "hp_ms", lambda *_: made["vectors"] @ made["vectors"].T)
    nothing: Any = [[None] * 2] * 3
    num_tries, alarms = 600, 0
    for _ in range(num_tries):
        prompt, seed, both = (
            torch.randn(3, 1, 6, generator=generator),
            torch.randn(1, 2, 6, generator=generator),
            torch.randn(3, 2, 6, generator=generator),
        )
        ways = [prompt + seed + both + torch.randn(3, 2, 6, generator=generator) for _ in range(2)]
        made["vectors"] = torch.cat([way.flatten(0, 1) for way in ways])
        p_value = seed_collapse(nothing, nothing).p_value
        assert p_value is not None
        alarms += p_value <= 0.05
    assert alarms / num_tries <= 0.05 + 2 * (0.05 * 0.95 / num_tries) ** 0.5


# --- Previews that look like warped training images ---------------------------------------------------------------


def test_registered_similarity_is_relative_to_the_sets_images() -> None:
    among = torch.tensor([0.5, 0.6, 0.7, 0.55])
    copies = registered_similarity(torch.tensor([0.9, 0.95, 0.92, 0.97]), among)
    assert copies.value == pytest.approx(0.935 - 0.5875)
    assert copies.p_value == pytest.approx(1 / 70)  # one of the 8 over 4 splits
    assert "0.94" in copies.meaning and "0.59" in copies.meaning
    assert not registered_similarity(among, among).outside
    alone = registered_similarity(among, torch.empty(0))
    assert alone.value is None and alone.p_value is None
