"""ImageReward (arXiv 2304.05977; Hub: THUDM/ImageReward, ImageReward.pt): a reward learned from human rankings.

BLIP's ViT-L looks at the image, BLIP's BERT reads the prompt and attends to what was seen; the [CLS] place goes
through five linear layers, and the result is standardised. The towers are transformers' own, so the checkpoint's
names are translated: its vision tower bears timm's names, its text tower BERT's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jobs import devices
from jobs.checkpoint import fill
from jobs.hub import Weights
from jobs.pretrained import Pretrained, too_long
from jobs.scorers.head import Head
from jobs.scorers.hps import MEAN, STD
from schemas.errors import WinnowError

REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
#: Mean and spread of the raw reward, as published with the weights.
CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35  # marks included
#: In the published file, but not asked: BLIP's projections for contrastive training, and the numbers 0 … 511.
UNUSED = (
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
)
#: Name in ``Network`` → published name; the first that fits.
NAMES = (
    (r"head\.", "mlp."),
    (r"text\.", "blip.text_encoder."),
    (r"vision\.embeddings\.class_embedding", "blip.visual_encoder.cls_token"),
    (r"vision\.embeddings\.position_embedding", "blip.visual_encoder.pos_embed"),
    (r"vision\.embeddings\.patch_embedding\.", "blip.visual_encoder.patch_embed.proj."),
    (r"vision\.post_layernorm\.", "blip.visual_encoder.norm."),
    (r"vision\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blip.visual_encoder.blocks.\1.norm\2."),
    (r"vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blip.visual_encoder.blocks.\1.attn.qkv."),
    (r"vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blip.visual_encoder.blocks.\1.attn.proj."),
    (r"vision\.encoder\.layers\.(\d+)\.mlp\.", r"blip.visual_encoder.blocks.\1.mlp."),
)


def published(name: str) -> str:
    """The checkpoint's name for one of ``Network``'s tensors."""
    pattern, other = next((p, o) for p, o in NAMES if re.match(p, name))
    return re.sub(pattern, other, name, count=1)


@dataclass(frozen=True)
class Shape:
    """Sizes of the two towers; by default the published ones (ViT-L/16 at 224 pixels, BERT base, med_config.json)."""

    size: int = 224
    patch: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    words: int = 30_524  # BERT's 30,522 and two marks of BLIP's, [DEC] and [ENC]


class Network(nn.Module):
    """Pixels [N, 3, size, size], ids and mask [N, MAX_TOKENS] → standardised reward [N]."""

    def __init__(self, shape: Shape) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision = BlipVisionConfig(
            image_size=shape.size,
            patch_size=shape.patch,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            layer_norm_eps=1e-6,  # of BLIP's own vision tower; transformers' default is another
        )
        text = BlipTextConfig(
            vocab_size=shape.words,
            hidden_size=shape.text_width,
            encoder_hidden_size=shape.width,
            intermediate_size=4 * shape.text_width,
            num_hidden_layers=shape.text_depth,
            num_attention_heads=shape.text_heads,
            max_position_embeddings=512,
            layer_norm_eps=1e-12,
            is_decoder=True,  # what gives the layers cross-attention; the mask stays that of an encoder
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = Head(shape.text_width)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        every = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=every
        ).last_hidden_state
        return (self.head(read[:, 0]) - CENTRE) / SPREAD


class ImageReward:
    """``local``: the checkpoint's file or its folder, with a BERT tokenizer beside it or else the Hub's; "" for the
    published one. float32."""

    def __init__(self, local: str = "", shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.weights = Weights(f"scorer {f'image-reward:{local}' if local else 'image-reward'!r}", local, REPO, FILE)
        beside = self.weights.path.parent if local else None
        own = beside is not None and any((beside / file).is_file() for file in ("vocab.txt", "tokenizer.json"))
        # Hashing the folder would hash the checkpoint twice, and whatever else lies there.
        self.words = str(beside) if own else TOKENIZER
        self.revision = self.weights.revision

    @cached_property
    def network(self) -> Network:
        network = Network(self.shape)
        fill(network, self.weights.tensors(), self.weights.what, UNUSED, published)
        return network.float().to(devices.device()).eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import BertTokenizer

        tokenizer = Pretrained(self.weights.what, self.words, weights=False).part(BertTokenizer)
        # BLIP's own marks: a prompt that spells them out is read as they are.
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        if len(tokenizer) > self.shape.words:
            raise WinnowError(
                f"{self.weights.what}: its tokenizer knows {len(tokenizer)} tokens, the model {self.shape.words}; "
                "give bert-base-uncased's"
            )
        return tokenizer

    @cached_property
    def transform(self) -> Any:
        """Image → float32 [3, size, size]: the shorter side resized (bicubic), the centre kept, normalised."""
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

        size = self.shape.size
        return Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), ToTensor(), Normalize(MEAN, STD)])

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Standardised reward float32 [N], about −2 to 2, and where the text was longer than 35 tokens [N]."""
        device = devices.device()
        text = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(device)
        pixels = torch.stack([self.transform(image.convert("RGB")) for image in images]).to(device)
        with devices.exact():
            reward = self.network(pixels, text.input_ids, text.attention_mask)
        return reward.cpu().numpy(), np.array(too_long(self.tokenizer, prompts, MAX_TOKENS))
