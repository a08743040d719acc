import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from sdlora.diffusion.noise import (
    PredictionType,
    add_noise,
    check_prediction_type,
    multires_noise,
    predicted_latents,
    prediction_target,
    velocity,
    zero_terminal_snr,
)
from sdlora.errors import BaseModelError
from sdlora.pocket.architecture import build_scheduler


def test_noise_of_several_resolutions_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 24, 16, generator=generator, dtype=torch.float64)
    levels: dict[int, torch.Tensor] = {}

    def draw(level: int, height: int, width: int) -> torch.Tensor:
        return levels.setdefault(level, torch.randn(4, height, width, generator=generator, dtype=torch.float64))

    found = multires_noise(noise, 0.3, draw, lambda level: 0.25)
    upsample = torch.nn.Upsample(size=(24, 16), mode="bilinear")
    expected = noise + sum(0.3**level * upsample(part[None])[0] for level, part in levels.items())
    # r = 2.5: 24 x 16, 9 x 6, 3 x 2, 1 x 1.
    assert [tuple(part.shape[1:]) for part in levels.values()] == [(24, 16), (9, 6), (3, 2), (1, 1)]
    torch.testing.assert_close(found, expected / expected.std(), rtol=1e-12, atol=0)
    assert float(found.std()) == pytest.approx(1.0)


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, 6, 4, 5, 3, generator=generator, dtype=torch.float64)
    return latents, noise, torch.tensor([0, 1, 147, 354, 800, 999])


def test_forward_process_and_velocity_equal_diffusers(
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    latents, noise, timesteps = drawn
    reference = DDPMScheduler.from_config(build_scheduler().config)
    alphas_cumprod = reference.alphas_cumprod.double()[timesteps]
    torch.testing.assert_close(
        add_noise(latents, noise, alphas_cumprod), reference.add_noise(latents, noise, timesteps), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        velocity(latents, noise, alphas_cumprod),
        reference.get_velocity(latents, noise, timesteps),
        rtol=1e-6,
        atol=1e-6,
    )


def test_schedule_is_that_of_stable_diffusion() -> None:
    # SD's scaled-linear betas: SNR falls below 5 at t = 147, passes 1 near 354 and ends at .0047.
    alphas_cumprod = build_scheduler().alphas_cumprod.double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    assert snr[146] > 5 > snr[147]
    assert abs(int((snr - 1).abs().argmin()) - 354) <= 1
    assert snr[999].item() == pytest.approx(0.0047, abs=5e-5)


def test_zero_terminal_snr_equals_diffusers() -> None:
    reference = DDPMScheduler.from_config(build_scheduler().config, rescale_betas_zero_snr=True)
    found = zero_terminal_snr(build_scheduler().alphas_cumprod.double())
    torch.testing.assert_close(found.float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert found[-1] == 0.0
    assert found[0] == pytest.approx(build_scheduler().alphas_cumprod[0].item())


def test_velocity_target_inverts_to_the_latents(drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    latents, noise, timesteps = drawn
    alphas_cumprod = build_scheduler().alphas_cumprod.double()[timesteps]
    noisy = add_noise(latents, noise, alphas_cumprod)
    v = prediction_target("v_prediction", latents, noise, alphas_cumprod)
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v, latents)
    assert prediction_target("epsilon", latents, noise, alphas_cumprod) is noise


def test_unknown_prediction_type_is_refused_by_name() -> None:
    assert check_prediction_type("v_prediction") == "v_prediction"
    with pytest.raises(BaseModelError, match="'sample'"):
        check_prediction_type("sample")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predicted_latents_equal_diffusers(
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor], prediction_type: PredictionType
) -> None:
    latents, noise, timesteps = drawn
    reference = DDIMScheduler.from_config(
        build_scheduler().config, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=True
    )
    alphas_cumprod = reference.alphas_cumprod.double()[timesteps]
    noisy = add_noise(latents, noise, alphas_cumprod)
    right = prediction_target(prediction_type, latents, noise, alphas_cumprod)
    torch.testing.assert_close(predicted_latents(prediction_type, noisy, right, alphas_cumprod), latents)
    reference.set_timesteps(1000)
    output = noise.flip(0)
    expected = [
        reference.step(output[i : i + 1], t, noisy[i : i + 1]).pred_original_sample for i, t in enumerate(timesteps)
    ]
    found = predicted_latents(prediction_type, noisy, output, alphas_cumprod)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_velocity_of_pure_noise_gives_the_latents(
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, noise, _ = drawn
    assert torch.equal(predicted_latents("v_prediction", noise, noise.flip(0), torch.zeros(6)), -noise.flip(0))
