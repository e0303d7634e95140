"""The stages in order: autoencoder, text, U-Net with text, export. Each one goes on where it stopped.

A stage's result is a file in the work folder; a stage whose result exists is not run again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.model.checkpoint import place
from batchsd.model.config import UNetConfig, VAEConfig
from batchsd.model.text import TextEncoder
from batchsd.model.unet import UNet
from batchsd.model.vae import AutoencoderKL
from batchsd.training.autoencoder import encode_all, encoded, normalise_latents, reconstruction_loss
from batchsd.training.config import TrainingConfig
from batchsd.training.data import Pictures
from batchsd.training.denoiser import Denoiser, Latents, noise_prediction_loss
from batchsd.training.export import export, scheduler_json
from batchsd.training.loop import train
from batchsd.training.text import Heads, attribute_labels, attribute_loss, new_text_encoder
from batchsd.training.tokenizer import write_tokenizer

Log = Callable[[str], None]


def from_nothing(config: TrainingConfig, pictures: Pictures, log: Log) -> None:
    """All stages in order, and the checkpoint folder."""
    text = text_encoder(config, pictures, log)
    vae = autoencoder(config, pictures, log)
    unet, average = denoiser(config, pictures, vae, text, log)
    write(config, vae, text, unet, average)


def autoencoder(config: TrainingConfig, pictures: Pictures, log: Log) -> AutoencoderKL:
    """The trained autoencoder, its latents normalised."""
    how = config.autoencoder
    shape = VAEConfig(3, 3, how.latent_channels, how.channels, how.layers, how.groups)
    torch.manual_seed(how.seed)
    vae = AutoencoderKL(shape)
    place(vae, torch.device("cpu"), torch.float32)
    vae.requires_grad_(True)
    done = config.work / "autoencoder.pt"
    if not done.exists():
        loss = reconstruction_loss(vae, pictures, how.batch_size)
        average = train(vae, loss, how, config.work / "autoencoder.state", log)
        vae.load_state_dict(average)
        means, _ = encode_all(vae, pictures)
        normalise_latents(vae, means)
        torch.save(vae.state_dict(), done)
    vae.load_state_dict(torch.load(done, weights_only=True))
    vae.config = VAEConfig(**{**vars(shape), "scaling_factor": 1.0})
    return vae.eval()


def text_encoder(config: TrainingConfig, pictures: Pictures, log: Log) -> TextEncoder:
    """A text encoder that tells attributes from captions, where the data names attributes."""
    how, folder = config.text, config.work / "tokenizer"
    if not folder.exists():
        write_tokenizer(folder, words_of(pictures.captions), max_length=how.tokens)
    torch.manual_seed(how.seed)
    encoder = new_text_encoder(folder, how.width, how.layers, how.heads)
    done = config.work / "text.pt"
    if pictures.attributes is None:
        return encoder
    if not done.exists():
        heads = Heads(encoder.model, attribute_labels(pictures.attributes), how.width)
        loss = attribute_loss(encoder, heads, pictures, how.batch_size)
        train(heads, loss, how, config.work / "text.state", log)
        torch.save(encoder.model.state_dict(), done)
    encoder.model.load_state_dict(torch.load(done, weights_only=True))
    return encoder


def words_of(captions: Sequence[str], most: int = 4000) -> list[str]:
    """The commonest words and marks of the captions, sorted: each becomes one token."""
    counted = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]+", caption.lower()))
    return sorted(word for word, _ in counted.most_common(most))


def new_unet(config: TrainingConfig, latent_size: int) -> UNet:
    """A randomly initialised U-Net with cross-attention at every level."""
    how = config.unet
    levels, latent = len(how.channels), config.autoencoder.latent_channels
    torch.manual_seed(how.seed)
    return UNet(
        UNetConfig(
            latent, latent, how.channels, (how.layers,) * levels, (True,) * levels, (True,) * levels,
            tuple(channels // how.head_width for channels in how.channels), config.text.width,
            groups=how.groups, linear_projection=True, sample_size=latent_size,
        )
    )  # fmt: skip


def denoiser(
    config: TrainingConfig, pictures: Pictures, vae: AutoencoderKL, text: TextEncoder, log: Log
) -> tuple[UNet, dict[str, Tensor]]:
    """The U-Net (for its config) and the moving average of U-Net and text encoder, `unet.*` and `text.*`."""
    how = config.unet
    latents = Latents(*encoded(config.work / "latents.pt", vae, pictures))
    unet = new_unet(config, latents.means_NCHW.shape[-1])
    schedule = NoiseSchedule.from_config(scheduler_json(how.prediction_type))
    loss = noise_prediction_loss(
        unet, text, latents, list(pictures.captions), schedule, how.batch_size, how.caption_dropout
    )
    state_file = config.work / "denoiser.state"
    return unet, train(Denoiser(unet, text.model), loss, how, state_file, log)


def write(config: TrainingConfig, vae: AutoencoderKL, text: TextEncoder, unet: UNet, average: Any) -> None:
    """The checkpoint folder, from the moving average."""
    parts = {
        name: {key.removeprefix(f"{name}."): v for key, v in average.items() if key.startswith(f"{name}.")}
        for name in ("unet", "text")
    }
    text_config = {**text.model.config.to_dict(), "architectures": ["CLIPTextModel"], "dtype": "float16"}
    export(
        config.output,
        unet=(unet.config, parts["unet"]),
        vae=(vae.config, vae.state_dict()),
        text=(text_config, parts["text"]),
        tokenizer=config.work / "tokenizer",
        prediction_type=config.unet.prediction_type,
    )
