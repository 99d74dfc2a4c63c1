"""Train the decoder of the image tokenizer further, with encoder and codebook frozen.

Tokens do not change, so this can run after, or in parallel with, the training of the model that generates them.

    python -m tools.emoji_world.refine_decoder --out build/emoji_world     # resumes from its checkpoint
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import JanusForConditionalGeneration, JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from tools.emoji_world.progress import Training, load_checkpoint, pick_device
from tools.emoji_world.train_janus import training_image
from tools.emoji_world.train_vq import CONFIG, decode, optimizers, reconstruction_loss


def main() -> None:
    """Train on the tokenized images of train_janus and write decoder.pt, which export.py puts into the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start-from", type=Path, help="checkpoint folder with the image tokenizer to start from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device()
    tokens = torch.load(args.out / "tokens.pt", weights_only=True)
    model = JanusVQVAE(JanusVQVAEConfig(**CONFIG))
    path = args.out / "decoder.pt"
    vq = load_checkpoint(args.out / "vq.pt")
    if args.start_from:
        model.load_state_dict(
            JanusForConditionalGeneration.from_pretrained(
                args.start_from, dtype=torch.float32
            ).model.vqmodel.state_dict()
        )
    elif vq is not None:
        model.load_state_dict(vq["model"])
    else:
        raise SystemExit(f"{args.out}/vq.pt is missing: run tools.emoji_world.train_vq first")
    nn.Module.to(model, device).requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
    trained = nn.ModuleList([model.decoder, model.post_quant_conv])
    training = Training(path, model, optimizers(trained, args.lr), steps=args.steps, lr=args.lr, descent=0.4)
    entries = F.normalize(model.quantize.embedding.weight, dim=1)
    for step in range(training.first_step, args.steps):
        rng = random.Random(32_452_843 * step + 1)
        rows = [rng.randrange(len(tokens)) for _ in range(args.batch)]
        images = np.stack([training_image(i)[1] for i in rows])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        output = decode(model, entries[tokens[rows].to(device, torch.long)].view(len(rows), 8, 8, -1))
        loss = reconstruction_loss(output, pixels)
        loss.backward()
        with torch.no_grad():
            mse = (output.clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
        training.finish_step(step, {"loss": loss.item(), "psnr": (-10 * mse.log10()).mean().item()})


if __name__ == "__main__":
    main()
