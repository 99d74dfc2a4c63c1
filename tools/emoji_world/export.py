"""Export the trained model, and the judge if it has been trained, into the package.

    python -m tools.emoji_world.export --out build/emoji_world

Weights are stored in float16. Also works while the training is still running, from its last checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

from tools.emoji_world import checkpoint
from tools.emoji_world.progress import load_checkpoint

PACKAGE = Path(__file__).parents[2] / "vce_ray/models/emoji_world"


def main() -> None:
    """Export the last checkpoint of train_janus, with the decoder of refine_decoder if it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder with the checkpoints of the training scripts")
    parser.add_argument("--package", type=Path, default=PACKAGE)
    args = parser.parse_args()
    processor = checkpoint.build_processor()
    net = checkpoint.build_model(processor)
    state = load_checkpoint(args.out / "janus.pt")
    if state is None:
        raise SystemExit(f"{args.out}/janus.pt is missing: run tools.emoji_world.train_janus first")
    net.load_state_dict(state["model"])
    decoder = load_checkpoint(args.out / "decoder.pt")
    if decoder is not None:
        net.model.vqmodel.load_state_dict(decoder["model"])
    with torch.no_grad():
        codes = net.model.vqmodel.quantize.embedding.weight
        # transformers picks the nearest code by distance; for unit vectors that is the nearest by angle, as trained
        codes.copy_(F.normalize(codes, dim=1))
    checkpoint.export(net.eval(), processor, args.package / "janus")
    if (args.out / "judge").exists():
        shutil.copytree(args.out / "judge", args.package / "judge", dirs_exist_ok=True)
    print(f"step {state['step']} -> {args.package}")


if __name__ == "__main__":
    main()
