from pathlib import Path

from transformers import AutoTokenizer

from sdlora.pocket import architecture, world


def test_words_of_the_world_are_one_token_and_others_are_spelt(tmp_path: Path) -> None:
    tokenizer = architecture.build_tokenizer(tmp_path)
    for scene in (world.random_scene(seed) for seed in range(200)):
        text = world.caption(scene)
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2, text
    assert len(tokenizer("zumi").input_ids) > 3
    assert tokenizer.decode(tokenizer("a zumi").input_ids, skip_special_tokens=True) == "a zumi"


def test_the_written_tokenizer_is_read_back_the_same(tmp_path: Path) -> None:
    tokenizer = architecture.build_tokenizer(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "A big Cat, named zumi; in the forest!"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id
    assert again.model_max_length == 77


def test_it_is_stable_diffusion_one_in_small() -> None:
    unet = architecture.build_unet()
    assert unet.config.down_block_types == ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    assert unet.config.mid_block_type == "UNetMidBlock2DCrossAttn"
    scheduler = architecture.build_scheduler()
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.00085, 0.012)
    assert (scheduler.config.beta_schedule, scheduler.config.prediction_type) == ("scaled_linear", "epsilon")
