"""Small pipelines of random weights, one of every family, in the ordinary diffusers layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import WORDS


def tokenizer() -> Any:
    from jobs.world.generator import word_tokenizer

    made = word_tokenizer(WORDS)
    made.model_max_length = 16
    return made


def clip_text(projection: bool, width: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=64, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(width: int = 32) -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = sorted({word for line in WORDS for word in line.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_gated_act=True,
        dense_act_fn="gelu_new", feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config), outer


def vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=channels, norm_num_groups=8,
        sample_size=32, scaling_factor=0.36 if channels == 16 else 0.13, shift_factor=0.1 if channels == 16 else None,
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32, transformer_layers_per_block=1,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip_text(False), text_encoder_2=clip_text(True), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=unet, scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )  # fmt: skip


def sd3(with_t5: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=24,
    )  # fmt: skip
    # The two CLIP towers side by side are 64 wide, and the pipeline pads them to the width of T5.
    encoder, words = t5(64) if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(16),
        text_encoder=clip_text(True), tokenizer=tokenizer(), text_encoder_2=clip_text(True), tokenizer_2=tokenizer(),
        text_encoder_3=encoder, tokenizer_3=words,
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    encoder, words = t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(16), text_encoder=clip_text(False), tokenizer=tokenizer(),
        text_encoder_2=encoder, tokenizer_2=words, transformer=transformer,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    "sdxl": sdxl, "sd3": lambda: sd3(True), "sd3-no-t5": lambda: sd3(False), "flux": flux,
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    BUILDERS[name]().save_pretrained(folder)
    return folder
