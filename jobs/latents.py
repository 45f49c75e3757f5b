"""An autoencoder as an encoder: latents, the space of the paper's distances and of training."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs import devices, hub, models
from jobs.digest import digest
from jobs.images import array
from schemas.errors import WinnowError

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model*.json", "diffusion_pytorch_model-*")


class Latents:
    """``model``: a name, folder or Hub id of a latent diffusion pipeline, of which the autoencoder alone is loaded, or
    of a bare autoencoder. ``scaled``: as the diffusion model sees them, else as the autoencoder gives them."""

    def __init__(self, model: str, scaled: bool = True) -> None:
        self.model, self.scaled = model, scaled
        self.lead = f"autoencoder {model!r}:"
        self.local = _local(model)
        if self.local is None and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
            raise WinnowError(
                f"{self.lead} no such folder; give a diffusers pipeline or autoencoder, as a folder or Hub id, or one "
                f"of {', '.join(models.MODELS)}"
            )
        self.revision = digest(_part(self.local, self.lead)) if self.local else hub.revision(model, self.lead)

    @cached_property
    def folder(self) -> Path:
        """The autoencoder's own folder; of a Hub id nothing else is downloaded."""
        if self.local:
            return _part(self.local, self.lead)
        found = hub.folder(self.model, (f"vae/{CONFIG}", CONFIG, "model_index.json"), self.lead)
        inside = _part(found, self.lead) != found
        hub.folder(self.model, tuple(f"vae/{name}" if inside else name for name in WEIGHTS), self.lead)
        return _part(found, self.lead)

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoModel
        from safetensors import SafetensorError

        try:
            vae = AutoModel.from_pretrained(str(self.folder), use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise WinnowError(f"{self.lead} cannot be loaded ({reason}); check the folder or the Hub id") from error
        if not hasattr(vae, "encode"):
            raise WinnowError(f"{self.lead} a {type(vae).__name__} encodes nothing; give an autoencoder")
        return vae.float().to(devices.device()).eval()

    @torch.no_grad()
    def flat(self, images: list[Image.Image]) -> np.ndarray:
        """Means of the latents, float32 [N, C·h·w], for images of one size."""
        if len({image.size for image in images}) > 1:
            raise WinnowError(f"{self.lead} the images have several sizes; their latents do not compare")
        pixels = array([image.convert("RGB") for image in images])
        return encode(self.vae, pixels, scaled=self.scaled).flatten(1).numpy()


def _local(model: str) -> Path | None:
    path = models.MODELS.get(model, Path(model).expanduser())
    return path if path.is_dir() else None


def _part(folder: Path, lead: str) -> Path:
    """The autoencoder in a pipeline's folder, or the folder itself where it is one."""
    if (folder / "vae" / CONFIG).is_file():
        return folder / "vae"
    if (folder / CONFIG).is_file() and not (folder / "model_index.json").is_file():
        return folder
    raise WinnowError(f"{lead} {folder} has neither vae/{CONFIG} nor, as an autoencoder's own folder, {CONFIG}")


AT_ONCE = 2**20  # pixels


@torch.no_grad()
def encode(vae: Any, images: np.ndarray, scaled: bool = True) -> torch.Tensor:
    """uint8 [N, H, W, 3] → latent means, float32 [N, C, h, w] on the CPU; ``scaled``: as the denoiser sees them."""
    # An autoencoder's first layers hold 128 numbers a pixel: one image of 1024² is half a gigabyte in each of them.
    batch = max(1, min(64, AT_ONCE // (images.shape[1] * images.shape[2])))
    parts = []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2)
        pixels = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        mean = _mean(vae.encode(pixels))
        shift, factor = _scale(vae, mean)
        parts.append(((mean - shift) * factor if scaled else mean).float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> np.ndarray:
    """Scaled latents [N, C, h, w] → images, float32 [N, H, W, 3] in [0, 1]."""
    latents = latents.to(vae.device, vae.dtype)
    shift, factor = _scale(vae, latents)
    # As many as fit where an autoencoder makes 8×8 pixels of a latent, as most do.
    batch = max(1, min(64, AT_ONCE // (64 * latents.shape[2] * latents.shape[3])))
    parts = []
    for start in range(0, len(latents), batch):
        pixels = vae.decode(latents[start : start + batch] / factor + shift).sample
        parts.append((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy())
    return np.concatenate(parts)


def _scale(vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """Shift and factor between an autoencoder's latents and the denoiser's, (latent − shift) · factor: numbers, or
    tensors [1, C, 1, 1] for an autoencoder with a mean and deviation of each channel."""
    factor = getattr(vae.config, "scaling_factor", None) or 1.0
    means, deviations = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    if means is None or deviations is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, factor
    mean, deviation = (like.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (means, deviations))
    return mean, factor / deviation


def _mean(encoded: Any) -> torch.Tensor:
    """The latents of a variational autoencoder (their mean), of a tiny or of a deep-compression one."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent
