"""Train the image tokenizer of the emoji world, which encodes 64x64 images as 64 tokens.

    python -m tools.emoji_world.train_vq --out build/emoji_world          # resumes from its checkpoint

Trains a plain autoencoder first, then adds a codebook initialized by k-means of its latents: a codebook trained from
scratch collapses. Codes and latents are unit vectors, because `JanusVQVAE.decode` normalizes the codes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from tools.emoji_world import scenes
from tools.emoji_world.progress import Training, pick_device
from tools.emoji_world.world import random_scene

CODES = 1024
CONFIG: dict[str, Any] = dict(
    base_channels=32,
    channel_multiplier=[1, 1, 2, 4],
    num_res_blocks=1,
    latent_channels=64,
    embed_dim=8,
    num_embeddings=CODES,
    num_patches=8,
    projection_dim=256,
    image_token_embed_dim=256,
)


def batch(step: int, size: int) -> Tensor:
    """Return the images of one training step, always the same for the same step: float [size, 3, 64, 64] in -1..1."""
    rng = random.Random(1_000_003 * step + 17)
    images = [torch.from_numpy(scenes.render(random_scene(rng), rng)) for _ in range(size)]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the convolutions, viewed as matrices [out, in * k * k], and AdamW for everything else."""
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and min(m.weight.shape[:2]) > 3]
    views = [nn.Parameter(weight.data.view(weight.shape[0], -1)) for weight in convs]  # shares the weights' storage
    chosen = {id(weight) for weight in convs}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(views, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    def share_gradients(*_: object) -> None:
        for view, weight in zip(views, convs, strict=True):
            assert weight.grad is not None, "every convolution contributes to the loss"
            view.grad = weight.grad.view_as(view)

    muon.register_step_pre_hook(share_gradients)
    return [muon, adam]


def reconstruction_loss(pixels: Tensor, target: Tensor) -> Tensor:
    """Return L1 of pixels and of horizontal and vertical differences (edges), plus a squared term for PSNR."""
    error = pixels - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * edges + error.square().mean()


def latents(model: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Return unit vectors before quantization: [batch, 8, 8, embed_dim]."""
    return F.normalize(model.quant_conv(model.encoder(pixels)), dim=1).permute(0, 2, 3, 1)


def decode(model: JanusVQVAE, codes: Tensor) -> Tensor:
    """Decode unit vectors [batch, 8, 8, embed_dim] to pixels."""
    return model.decoder(model.post_quant_conv(codes.permute(0, 3, 1, 2)))


@torch.no_grad()
def kmeans(points: Tensor, count: int, rounds: int = 25) -> Tensor:
    """Return `count` unit vectors found by spherical k-means. An empty cluster is restarted at a random point."""
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = nearest.bincount(minlength=count) == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=1)
    return centres


def main() -> None:
    """Train, with checkpoints from which the same command resumes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--codebook-at", type=float, default=0.25, help="share of the steps before quantization")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device()
    path = args.out / "vq.pt"
    model = JanusVQVAE(JanusVQVAEConfig(**CONFIG))
    for module in model.modules():  # transformers' initial std of 0.02 is too small for this network to train
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    nn.Module.to(model, device).train()
    start_codes = int(args.steps * args.codebook_at)
    training = Training(path, model, optimizers(model, args.lr), steps=args.steps, lr=args.lr, descent=0.4)
    usage, flat = training.state.get("usage", torch.ones(CODES)).to(device), torch.empty(0, 8)
    codebook = model.quantize.embedding.weight
    for step in range(training.first_step, args.steps):
        pixels = batch(step, args.batch).to(device)
        if step == start_codes:
            with torch.no_grad():
                samples = [latents(model, batch(10**6 + i, 64).to(device)).reshape(-1, 8).cpu() for i in range(10)]
                codebook.copy_(kmeans(torch.cat(samples), CODES))
        z = latents(model, pixels)
        if step < start_codes:
            codes, commitment = z + 0.02 * torch.randn_like(z), torch.zeros((), device=device)
        else:
            entries = F.normalize(codebook, dim=1)
            flat = z.detach().reshape(-1, 8)
            nearest = (flat @ entries.detach().T).argmax(1)
            chosen = entries[nearest].view_as(z)
            commitment = (chosen.detach() - z).square().mean() + (chosen - z.detach()).square().mean()
            codes = z + (chosen - z).detach()
            usage = 0.99 * usage + nearest.bincount(minlength=CODES)
        output = decode(model, codes)
        loss = reconstruction_loss(output, pixels) + 2.0 * commitment
        loss.backward()
        if start_codes <= step < 0.7 * args.steps and step % 50 == 0:  # restart unused codes at random latents
            dead = (usage < 0.5).nonzero()[:, 0]
            with torch.no_grad():
                codebook[dead] = flat[torch.randint(len(flat), (len(dead),), device=device)]
            usage[dead] = 5.0
        with torch.no_grad():
            mse = (output.clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
            psnr = (-10 * mse.log10()).mean().item()
        used = (usage > 0.5).float().mean().item()
        training.finish_step(step, {"loss": loss.item(), "psnr": psnr, "used": used}, usage=usage)


if __name__ == "__main__":
    main()
