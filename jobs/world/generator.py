"""The base text-to-image model of the embedded world, in the ordinary Stable Diffusion layout.

An autoencoder (16×16 RGB → 8×8×8 latents), a CLIP text encoder with a word vocabulary and a U-Net that has the
pooled text in its time embedding, trained by flow matching: x_t = (1 − σ)·x + σ·ε, target ε − x, σ logit-normal
(Esser et al. 2024, arXiv 2403.03206, eq. 19).
It is left well short of convergence on purpose: a base with crisp but wrong digits is what self-improvement needs.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.latents import encode
from jobs.world.fit import Progress, fit, fresh_scenes, pixels
from jobs.world.scenes import SIZE, Handwriting, all_captions, caption, draw_scenes, render

MAX_WORDS = 10  # the longest caption has 7 words, and two marks
LATENT_CHANNELS = 8
SCENES = 40_000  # drawn once and encoded once: the handwriting behind them is 15,000 digits


def word_tokenizer(captions: list[str]) -> Any:
    """A CLIPTokenizer in which every word of the captions is one token.

    The merges are learned, not written by hand: byte-pair training goes on until the words are whole, so that
    encoding repeats the very merges that made them.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    # Named beforehand: the trainer would number what ends a word as its hash table has it, otherwise in every process.
    ends = sorted({f"{word[-1]}</w>" for line in captions for word in line.lower().split()})
    bpe = Tokenizer(models.BPE(unk_token=marks[1], end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    learn = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[*marks, *ends], end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, learn)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=merges, model_max_length=MAX_WORDS, pad_token=marks[1], unk_token=marks[1]
    )


def train_autoencoder(hand: Handwriting, steps: int, rng: np.random.Generator, progress: Progress) -> Any:
    """AutoencoderKL 16×16×3 → 8×8×8, trained on scenes; its ``scaling_factor`` makes latents unit variance."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    batches = fresh_scenes(hand, 64, rng)

    def loss() -> Tensor:
        images = pixels(next(batches)[1])
        mean = vae.encode(images).latent_dist.mean
        error = vae.decode(mean + 0.05 * torch.randn_like(mean)).sample - images
        # Strokes cover a fifth of the picture: pixels unlike their image's mean colour count four times.
        weight = 1 + 3 * ((images - images.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True) > 0.3)
        return (weight * (error.square() + 0.2 * error.abs())).mean() + 1e-4 * mean.square().mean()

    fit("autoencoder", vae.parameters(), loss, steps, lr=2e-3, progress=progress)
    with torch.no_grad():
        latents = vae.encode(pixels(next(batches)[1])).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def new_pipeline(vae: Any) -> Any:
    """A StableDiffusionPipeline with an untrained text encoder and U-Net around ``vae``."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = word_tokenizer(all_captions())
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_WORDS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def token_ids(tokenizer: Any, texts: list[str]) -> Tensor:
    """Padded token ids [N, MAX_WORDS]."""
    return tokenizer(
        texts, padding="max_length", max_length=MAX_WORDS, truncation=True, return_tensors="pt"
    ).input_ids


def train_generator(
    hand: Handwriting, vae: Any, steps: int, batch: int, rng: np.random.Generator, progress: Progress
) -> Any:
    """Text encoder and U-Net from scratch on scenes; returns the pipeline with averaged (EMA 0.999) weights."""
    pipe = new_pipeline(vae)
    unet, text_encoder = pipe.unet, pipe.text_encoder
    scenes = draw_scenes(SCENES, rng)
    ids = token_ids(pipe.tokenizer, [caption(s) for s in scenes])
    nothing = token_ids(pipe.tokenizer, [""])
    scaled = encode(vae, render(scenes, hand, rng))

    def loss() -> Tensor:
        some = torch.from_numpy(rng.integers(0, SCENES, batch))
        latents = scaled[some]
        # One caption in ten is dropped, so that classifier-free guidance works too.
        texts = torch.where(torch.rand(batch, 1) < 0.1, nothing, ids[some])
        sigma = torch.sigmoid(torch.randn(batch))
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, sigma[:, None, None, None])
        context = text_encoder(texts)[0]
        return (unet(noisy, sigma * 1000, context).sample - (noise - latents)).square().mean()

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    fit("generator", parameters, loss, steps, lr=2e-3, progress=progress, ema=0.999)
    pipe.unet.eval()
    pipe.text_encoder.eval()
    return pipe
