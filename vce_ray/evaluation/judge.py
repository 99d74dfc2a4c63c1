"""The judge: a CLIP that names what it sees in a picture and scores how well a picture fits its prompt.

It is another model than the one it judges and is never used in making pairs. Knows pictures and texts, not
files of a run, prompts' origins or Ray. Shapes: B pictures, L label texts, H W picture height and width, E width of
what pictures and texts are compared in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vce_ray.concepts.concept import Kind, fix_articles
from vce_ray.errors import UserError

NOTHING = "nothing"
"""The label of a picture without an object: it keeps the judge from forcing an empty picture into one."""
FILES = ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json")


class Judge:
    """An open_clip model from a local folder, in float32. The same pictures and texts always get the same answer."""

    def __init__(self, folder: Path, device: str = "cpu", batch_size: int = 256):
        """Loads the folder's weights, which are safetensors; nothing is downloaded.

        Raises:
            UserError: a file of the folder is missing.
        """
        folder = Path(folder)
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise UserError(f"{folder} is no judge: {missing[0]} is missing; give a folder in open_clip's format")
        model, _, preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", precision="fp32", device=device
        )
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._model: Any = model.eval()  # its parts are called, which torch's types do not let one say
        self._preprocess: Any = preprocess
        self._tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")

    @torch.inference_mode()
    def look(self, images: np.ndarray) -> Tensor:
        """What the judge sees of pictures uint8 [B, H, W, 3], and is then asked about: unit vectors, float32 [B, E].

        Raises:
            UserError: pictures are not uint8 [B, H, W, 3].
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"pictures must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}")
        rows = []
        for start in range(0, len(images), self.batch_size):
            batch = [self._preprocess(Image.fromarray(image)) for image in images[start : start + self.batch_size]]
            rows.append(F.normalize(self._model.encode_image(torch.stack(batch).to(self.device)), dim=-1))
        return torch.cat(rows) if rows else self._empty()

    @torch.inference_mode()
    def labels_of(self, seen_BE: Tensor, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The text that fits each picture best, by cosine: its index, int64 [B], and all probabilities, float32 [B, L].

        Probabilities are a softmax over the cosines at the model's own temperature.

        Raises:
            UserError: there are no texts.
        """
        if not texts:
            raise ValueError("no label texts: give at least one for the judge to choose")
        cosines_BL = seen_BE @ self._texts(texts).T
        scale = self._model.logit_scale.exp().clamp(max=100)
        probabilities = (scale * cosines_BL).softmax(-1)
        return cosines_BL.argmax(-1).cpu().numpy(), probabilities.cpu().numpy()

    @torch.inference_mode()
    def score(self, seen_BE: Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each picture with its own prompt, float32 [B], in -1..1.

        Raises:
            UserError: pictures and prompts differ in number.
        """
        if len(seen_BE) != len(prompts):
            raise ValueError(f"{len(seen_BE)} pictures but {len(prompts)} prompts: give one prompt for each picture")
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self._texts(list(distinct))[[distinct[prompt] for prompt in prompts]]
        return (seen_BE * texts).sum(-1).cpu().numpy()

    def name_labels(self, seen_BE: Tensor, labels: Sequence[str], kind: Kind) -> list[str]:
        """The label that fits each picture best; for objects 'nothing' is one more choice, whether listed or not.

        Raises:
            UserError: there are fewer than two labels.
        """
        if len(labels) < 2:
            raise UserError(f"labels {list(labels)}: give the judge at least two to choose among")
        choices = list(labels) if kind == "style" else list(dict.fromkeys([*labels, NOTHING]))
        index, _ = self.labels_of(seen_BE, [label_text(label, kind) for label in choices])
        return [choices[i] for i in index]

    def _texts(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for start in range(0, len(texts), self.batch_size):
            ids = self._tokenizer(list(texts[start : start + self.batch_size])).to(self.device)
            rows.append(F.normalize(self._model.encode_text(ids), dim=-1))
        return torch.cat(rows) if rows else self._empty()

    def _empty(self) -> Tensor:
        return torch.empty((0, self._model.encode_text(self._tokenizer(["a"]).to(self.device)).shape[-1]))


def label_text(label: str, kind: Kind) -> str:
    """The text by which a label is looked for: 'a deer', 'an owl', 'in the style of noto', or 'nothing' as it is."""
    if label == NOTHING:
        return label
    return f"in the style of {label}" if kind == "style" else fix_articles(f"a {label}")
