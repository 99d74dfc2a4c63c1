"""LlamaGen's image tokenizer, with patches of 16 x 16 pixels: images to codes and back.

Modules are named as in the released weights. Shape legend: B images, T image tokens, H W image height and width,
h w height and width of the token grid, C channels, K codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vce_ray.errors import UserError
from vce_ray.models.pixels import decode_in_batches

CHANNEL_MULTIPLES = (1, 1, 2, 2, 4)
"""Channels at each resolution, in units of `VQConfig.channels`. Each resolution is half of the one before."""
BLOCKS = 2
"""Residual blocks of the encoder per resolution; the decoder has one more."""
USAGE_WINDOW = 65536
"""Length of the buffer in which the released training recorded the codes it had last used."""
NORM_GROUPS = 32
"""Groups of GroupNorm."""
BATCH = 16
"""Images encoded at once: few enough that their activations are small beside a GPU's weights."""


@dataclass(frozen=True)
class VQConfig:
    """Sizes that determine the weights' shapes; the released tokenizer has 128 channels."""

    channels: int
    latent_channels: int
    codebook_size: int
    code_width: int


class VQModel(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    @torch.no_grad()
    def encode_pixels(self, images: np.ndarray) -> Tensor:
        """Encode images, uint8 [B, H, W, 3], as image tokens, int64 [B, T].

        Raises:
            UserError: height or width is not a multiple of 16.
        """
        patch = 2 ** (len(CHANNEL_MULTIPLES) - 1)
        if images.shape[1] % patch or images.shape[2] % patch:
            raise UserError(f"images of {images.shape[1]} x {images.shape[2]} pixels: give multiples of {patch}")
        weight = self.quant_conv.weight
        parts = []
        for pixels in torch.from_numpy(images).split(BATCH):
            scaled = pixels.to(weight.device, weight.dtype).permute(0, 3, 1, 2) / 127.5 - 1
            parts.append(self.quantize.nearest(self.quant_conv(self.encoder(scaled))))
        return torch.cat(parts)

    @torch.no_grad()
    def decode_pixels(self, tokens_BT: Tensor) -> np.ndarray:
        """Decode image tokens of a square grid to images, uint8 [B, H, W, 3].

        Raises:
            UserError: T is not a square number.
        """
        grid = math.isqrt(tokens_BT.shape[1])
        if grid**2 != tokens_BT.shape[1]:
            raise UserError(f"{tokens_BT.shape[1]} image tokens do not form a square grid")

        def decode(tokens: Tensor) -> Tensor:
            codes = self.quantize.codes()[tokens].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
            return self.decoder(self.post_quant_conv(codes))

        return decode_in_batches(tokens_BT.to(self.quant_conv.weight.device), decode)


class Quantizer(nn.Module):
    """The codebook. Codes are normalized to length 1, both to compare them with latents and as the decoder's input."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_width)
        self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))  # for training; in the released weights

    def codes(self) -> Tensor:
        """Return all codes, normalized to length 1: [K, C]."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, latents_BChw: Tensor) -> Tensor:
        """Return the code nearest to each latent, int64 [B, h*w]: for codes of length 1, the largest inner product."""
        return (latents_BChw.flatten(2).transpose(1, 2) @ self.codes().T).argmax(-1)


class Encoder(nn.Module):
    """Images [B, 3, H, W] to latents [B, C, H/16, W/16]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.channels * multiple for multiple in CHANNEL_MULTIPLES]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        before = config.channels
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.conv_blocks.append(Level(before, width, BLOCKS, attend=last, resize=None if last else "downsample"))
            before = width
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images with values in -1..1."""
        x = self.conv_in(pixels)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] to images [B, 3, 16h, 16w]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.channels * multiple for multiple in reversed(CHANNEL_MULTIPLES)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        before = widths[0]
        for level, width in enumerate(widths):
            resize = "upsample" if level < len(widths) - 1 else None
            self.conv_blocks.append(Level(before, width, BLOCKS + 1, attend=level == 0, resize=resize))
            before = width
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents to values of about -1..1."""
        x = self.mid(self.conv_in(latents))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """One resolution: residual blocks, each with attention if `attend`, then a change of size."""

    def __init__(
        self, inputs: int, width: int, blocks: int, attend: bool, resize: Literal["downsample", "upsample"] | None
    ):
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(inputs if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(width) if attend else nn.Identity() for _ in range(blocks))
        if resize == "downsample":
            self.downsample = Downsample(width)
        if resize == "upsample":
            self.upsample = Upsample(width)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to features [B, C, h, w]; a change of size doubles or halves h and w."""
        for block, attention in zip(self.res, self.attn):
            x = attention(block(x))
        return self.get_submodule(self.resize)(x) if self.resize else x


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, which is a 1 x 1 convolution if the number of channels changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, h, w] to features [B, C, h, w]."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head attention over all positions of a feature map."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, h, w] to features [B, C, h, w]."""
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, h, w] to [B, C, h/2, w/2]. Padding is on the right and at the bottom only."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, h, w] to [B, C, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)
