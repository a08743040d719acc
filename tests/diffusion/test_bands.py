from sdlora.diffusion.bands import band_names, band_of


def test_five_bands_of_200_timesteps() -> None:
    assert [band_of(timestep) for timestep in (0, 199, 200, 399, 400, 600, 799, 800, 999)] == [
        0, 0, 1, 1, 2, 3, 3, 4, 4,
    ]  # fmt: skip
    assert band_names() == ["0-199", "200-399", "400-599", "600-799", "800-999"]
