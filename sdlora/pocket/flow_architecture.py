"""The parts that pocket-flow is made of: a Z-Image in every respect but its size.

Used by `pretrain_flow`. Classes, template, latents and folder layout are those of Z-Image; widths are smaller, and the
tokenizer's vocabulary holds the bytes and the words of pocket's world.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from sdlora.pocket.architecture import merged, world_words

SIZE_PX = 128
TEXT_WIDTH = 128
MAX_TOKENS = 512
SHIFT = 2.0
"""Of the noise levels; fewer pixels need a smaller one than Z-Image has (Esser et al. 2403.03206, equation 23)."""
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SPACE = "Ġ"  # how a byte-level vocabulary writes the space before a word
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The byte-pair vocabulary: all bytes, merges that make one token of every word of the world, and Qwen's marks.

    Any other word is spelt in bytes, so that every caption and every trigger word has tokens of its own.
    """
    merges: list[tuple[str, str]] = []
    for word in [*world_words(), "user", "assistant"]:
        for spelling in (list(word), [_SPACE, *word]):
            # Joining what the earlier merges leave of a word never changes the words before it.
            pieces = merged(spelling, merges)
            while len(pieces) > 1:
                merges.append((pieces[0], pieces[1]))
                pieces = [pieces[0] + pieces[1], *pieces[2:]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(left + right for left, right in merges), *_MARKS]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with pocket's vocabulary and Qwen3's chat template for a single request."""
    vocab, merges = vocabulary()
    end, start, stop = _MARKS
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=end,
        pad_token=end,
        eos_token=stop,
        additional_special_tokens=[start, stop],
        model_max_length=MAX_TOKENS,
        chat_template=_TEMPLATE,
    )


def build_vae() -> AutoencoderKL:
    """The autoencoder: 128x128 images to 16x16 latents of sixteen channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=SIZE_PX,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """The text encoder, trained together with the transformer; its second to last states are read."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3Model(config)


def build_transformer() -> ZImageTransformer2DModel:
    """The denoiser, with Z-Image's blocks, two patches a latent, and text and image side by side."""
    network = ZImageTransformer2DModel(
        in_channels=16,
        dim=256,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[16, 24, 24],
        axes_lens=[MAX_TOKENS + 64, 64, 64],
    )
    for embedder in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(embedder, std=0.02)
    return network


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Z-Image's kind of schedule, with a shift for small images."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
