"""A loaded checkpoint: text encoder, U-Net, VAE and what its scheduler config says, on one device.

text -> states; (latents, timestep, states) -> prediction; latents <-> pictures
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from batchsd.model.config import unet_config, vae_config
from batchsd.model.depth import DepthEstimator
from batchsd.model.folder import read_folder
from batchsd.model.inversion import learn_words
from batchsd.model.lora import merge_loras
from batchsd.model.pages import mapped_ranges, release
from batchsd.model.parts import Parts
from batchsd.model.single_file import read_single_file
from batchsd.model.text import TextEncoder, build_text_encoder
from batchsd.model.tokenizer import load_tokenizer
from batchsd.model.unet import UNet
from batchsd.model.vae import AutoencoderKL
from batchsd.model.vae_file import read_vae
from batchsd.model.weights import fill, on_meta
from batchsd.types import UsageError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Model:
    """A Stable Diffusion checkpoint in memory. Latents are scaled (unit variance) wherever they are handed out."""

    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder
    scheduler_config: Mapping[str, Any]
    text_2: TextEncoder | None = None  # SDXL's second, whose states stand beside the first's
    zero_negative: bool = False  # a negative prompt that is not given is zeros (SDXL), not the empty text
    reasons: tuple[str, ...] = ()  # what was recognised, and why
    depth: DepthEstimator | None = None  # SD2-depth's, built when a row first needs it

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def extra_channels(self) -> int:
        """Input channels of the U-Net beside the noisy latents: 0 text, 1 depth, 4 edit, 5 inpainting."""
        return self.unet.config.in_channels - self.latent_channels

    @property
    def scale_factor(self) -> int:
        """Pixels a latent, along a side."""
        return self.vae.config.factor

    @property
    def native_size(self) -> int:
        """The side, in pixels, that the checkpoint was trained for."""
        return self.unet.config.sample_size * self.scale_factor

    @property
    def takes_sizes(self) -> bool:
        """Whether the network is also told the pooled text and the picture's sizes (SDXL): its `added` argument."""
        return self.unet.config.added_dim > 0

    @property
    def guidance_dim(self) -> int:
        """Numbers in which the network is told its guidance (LCM); 0: it is not."""
        return self.unet.config.guidance_dim

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> states (B, T, D)."""
        return self.encode_prompts(texts)[0]

    def encode_prompts(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor | None]:
        """Texts -> states (B, T, D), and pooled (B, P) for SDXL, else None. A text that is None becomes zeros."""
        given = ["" if text is None else text for text in texts]
        states_BTD, pooled_BP = self.text.encode_pooled(given)
        if self.text_2 is not None:
            more_BTD, pooled_BP = self.text_2.encode_pooled(given)
            states_BTD = torch.cat([states_BTD, more_BTD], dim=-1)
        for i, text in enumerate(texts):
            if text is None:
                states_BTD[i] = 0
                if pooled_BP is not None:
                    pooled_BP[i] = 0
        return states_BTD, pooled_BP

    def time_ids(
        self,
        height: int,
        width: int,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target: tuple[int, int] | None = None,
    ) -> Tensor:
        """SDXL's (6,): original size, crop's corner, target size, each (height, width) or (top, left) in pixels."""
        size = (height, width)
        return torch.tensor([*(original or size), *crop, *(target or size)], dtype=torch.float32)

    @torch.no_grad()
    def encode_image(self, image_3HW: Tensor, generator: torch.Generator) -> Tensor:
        """A picture in [-1, 1] -> a draw of its posterior, scaled, float32 (C, H/f, W/f).

        The draw is one float32 tensor of (1, C, H/f, W/f) from the row's CPU generator, as diffusers' img2img
        makes it.
        """
        posterior = self.vae.encode(image_3HW[None].to(self.device, self.vae.encoder.dtype))
        noise = torch.randn(posterior.mean_BCHW.shape, generator=generator, dtype=torch.float32)
        drawn = posterior.sample(noise.to(posterior.mean_BCHW))
        return (drawn[0] * self.vae.config.scaling_factor).float().cpu()

    @torch.no_grad()
    def encode_mode(self, image_3HW: Tensor) -> Tensor:
        """A picture in [-1, 1] -> its posterior's mode, not scaled (as instruct-pix2pix reads it), float32."""
        return self.vae.encode(image_3HW[None].to(self.device, self.vae.encoder.dtype)).mean_BCHW[0].float().cpu()

    def estimate_depth(self, picture_HW3: np.ndarray, convention: str = "diffusers") -> np.ndarray | None:
        """An RGB picture, uint8 -> a float32 map of any size, greater is nearer; None: there is no depth network."""
        return None if self.depth is None else self.depth(picture_HW3, convention)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents -> pictures in [0, 1], float32 (B, 3, H, W), on the device.

        A decoder of a half type that overflows is put into float32, for good, and asked again. The encoder stays as it
        is: a GPU decodes beside the next rows' encoding.
        """
        z_BCHW = latents_BCHW / self.vae.config.scaling_factor
        pictures = self.vae.decode(z_BCHW.to(self.vae.dtype))
        if self.vae.dtype != torch.float32 and not torch.isfinite(pictures).all():
            for part in filter(None, (self.vae.decoder, self.vae.post_quant_conv)):
                place(part, self.device, torch.float32)
            pictures = self.vae.decode(z_BCHW.float())
        return (pictures.float() / 2 + 0.5).clamp(0, 1)


def load(
    path: Path,
    dtype: str = "auto",
    device: str = "auto",
    *,
    vae: str = "",
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    clip_skip: int = 0,
    tokenizer: str = "",
    ema: bool = False,
) -> Model:
    """Loads a folder in diffusers' layout or a single file in LDM's. Nothing is downloaded.

    `device` "auto" takes a GPU where there is one; `dtype` "auto" is float32 on a CPU (half types are many times
    slower there) and bfloat16 or float16 on a GPU. `vae`, `embeddings` and `tokenizer` are paths, `loras` paths
    with a weight behind a colon (`a.safetensors:0.8`); `clip_skip` counts as in `text`; `ema` takes a single
    file's averaged U-Net. Raises `UsageError` naming file and tensor.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    parts = read_parts(path, vae, ema)
    needs_vae(parts)
    ranges = mapped_ranges()
    unet, autoencoder = networks(parts)
    fill(unet, parts.unet, f"{parts.where}: unet")
    place(unet, where, kind, ranges)
    fill(autoencoder, parts.vae, f"{parts.where}: vae")
    upcast = kind == torch.float16 and autoencoder.config.force_upcast
    place(autoencoder, where, torch.float32 if upcast else kind, ranges)
    texts = _text_encoders(parts, clip_skip, tokenizer)
    width = sum(text.model.config.hidden_size for text in texts)
    if width != unet.config.context_dim:
        raise UsageError(
            f"{path}: the text encoder gives {width} numbers a token, the U-Net takes {unet.config.context_dim}; "
            "these parts are not of one checkpoint"
        )
    for text in texts:
        place(text.model, where, kind, ranges)
    second = texts[1] if len(texts) > 1 else None
    learn_words(texts, embeddings)
    merge_loras(unet, [text.model for text in texts], loras)
    return Model(
        unet, autoencoder, texts[0], parts.scheduler, text_2=second, zero_negative=parts.zero_negative,
        reasons=parts.reasons, depth=DepthEstimator(parts.depth, where) if parts.depth else None,
    )  # fmt: skip


def read_parts(path: Path, vae: str = "", ema: bool = False) -> Parts:
    """The parts of a checkpoint of any layout, with another VAE where one is named. Raises `UsageError`."""
    if path.is_dir():
        parts = read_folder(path, vae=not vae)
    elif path.is_file():
        parts = read_single_file(path, ema)
    else:
        raise UsageError(
            f"model.path: {path} is neither a file nor a folder in diffusers layout (model_index.json, unet/, ...)"
        )
    if vae:
        config, state = read_vae(Path(vae), parts.vae_config)
        return replace(parts, vae_config=config, vae=state)
    return parts


def needs_vae(parts: Parts) -> None:
    """Raises `UsageError` where there is no autoencoder, as single files may be."""
    if not parts.vae:
        raise UsageError(f"{parts.where}: holds no autoencoder; name one as model.vae")


def networks(parts: Parts) -> tuple[UNet, AutoencoderKL]:
    """U-Net and VAE of these configs, on the meta device."""
    unet = unet_config(parts.unet_config, f"{parts.where}: unet/config.json")
    vae = vae_config(parts.vae_config, f"{parts.where}: vae/config.json")
    return cast(UNet, on_meta(UNet, unet)), cast(AutoencoderKL, on_meta(AutoencoderKL, vae))


def _text_encoders(parts: Parts, clip_skip: int, tokenizer: str) -> list[TextEncoder]:
    """One encoder with its last layer, or SDXL's two, each with the last layer but one and no norm after it."""
    words = load_tokenizer(Path(tokenizer)) if tokenizer else None
    if len(parts.texts) == 1:
        return [build_text_encoder(parts.texts[0], clip_skip, tokenizer=words)]
    return [build_text_encoder(text, 1 + clip_skip, normed=False, tokenizer=words) for text in parts.texts]


def place(module: nn.Module, device: torch.device, dtype: torch.dtype, ranges: Sequence[tuple[int, int]] = ()) -> None:
    """Moves a network to where it draws, one tensor at a time, giving back the pages of mapped `ranges` at once.

    Convolutions' weights lie channels last: 1.04-1.3 times as fast on a CPU, and what a GPU's tensor cores want.
    """
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        before = parameter.data
        layout = torch.channels_last if parameter.ndim == 4 else torch.preserve_format
        parameter.data = before.to(device, dtype, memory_format=layout)
        if parameter.data.data_ptr() != before.data_ptr():
            release(before, ranges)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where torch sees one. Raises `UsageError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"model.device: {name!r} is unknown; auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"model.device: {name!r}, but torch {torch.__version__} sees no GPU here")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; "auto" as `load` says. Raises `UsageError`."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    full = _SHORT.get(name, name)
    if full not in _DTYPES:
        raise UsageError(f"model.dtype: {name!r} is unknown; auto, {', '.join(_DTYPES)}")
    return _DTYPES[full]
