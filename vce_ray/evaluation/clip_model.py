"""A CLIP from a local folder in open_clip's format: image and text embeddings, zero-shot labels, prompt similarity.

Knows images and texts only: no runs, no prompt origins, no Ray. Shapes: B images, H W image height and width,
L label texts, E width of the embeddings.
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

from vce_ray.concepts.concept import Kind
from vce_ray.errors import UserError
from vce_ray.evaluation.content import phrase
from vce_ray.evaluation.detectors.base import NOTHING
from vce_ray.models.words import Vocabulary, normalize


class ClipModel:
    """An open_clip model in float32: the same images and texts always give the same result."""

    def __init__(self, folder: Path, device: str = "cpu", batch_size: int = 256):
        """Load the folder's weights, from safetensors or, without running any code in it, from a pickle.

        Args:
            folder: as `judge.judge_folder` returns it.
            batch_size: images or texts per forward pass.
        """
        model, _, preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", precision="fp32", device=device, weights_only=True
        )
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._model: Any = model.eval()  # Any: torch's types do not allow calling its submodules
        self._preprocess: Any = preprocess
        self._tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
        self._closed = Vocabulary.of(folder) is not None

    @torch.inference_mode()
    def encode_images(self, images_BHWC: np.ndarray) -> Tensor:
        """Return unit embeddings, float32 [B, E], of images uint8 [B, H, W, 3].

        Raises:
            ValueError: the images have another dtype or shape.
        """
        if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
            raise ValueError(f"images must be uint8 [B, H, W, 3], not {images_BHWC.dtype} {list(images_BHWC.shape)}")
        rows = []
        for start in range(0, len(images_BHWC), self.batch_size):
            batch = images_BHWC[start : start + self.batch_size]
            pixels = torch.stack([self._preprocess(Image.fromarray(image)) for image in batch])
            rows.append(F.normalize(self._model.encode_image(pixels.to(self.device)), dim=-1))
        return torch.cat(rows) if rows else self._empty()

    @torch.inference_mode()
    def classify(self, embeddings_BE: Tensor, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the closest text, int64 [B], and the probabilities of all texts, float32 [B, L].

        Closeness is the cosine; probabilities are a softmax over the cosines at the model's own temperature.

        Raises:
            ValueError: there are no texts.
        """
        if not texts:
            raise ValueError("no label texts: give at least one")
        cosines_BL = embeddings_BE @ self._encode_texts(texts).T
        scale = self._model.logit_scale.exp().clamp(max=100)
        probabilities_BL = (scale * cosines_BL).softmax(-1)
        return cosines_BL.argmax(-1).cpu().numpy(), probabilities_BL.cpu().numpy()

    @torch.inference_mode()
    def prompt_scores(self, embeddings_BE: Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Return the cosine of each image with its own prompt, float32 [B], in -1..1.

        Raises:
            ValueError: the numbers of images and prompts differ.
        """
        if len(embeddings_BE) != len(prompts):
            raise ValueError(f"{len(embeddings_BE)} images but {len(prompts)} prompts: give one prompt for each image")
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts_BE = self._encode_texts(list(distinct))[[distinct[prompt] for prompt in prompts]]
        return (embeddings_BE * texts_BE).sum(-1).cpu().numpy()

    def best_labels(self, embeddings_BE: Tensor, labels: Sequence[str], kind: Kind) -> list[str]:
        """Return the closest label of each image; as `sure_labels` without the probabilities."""
        return [label for label, _ in self.sure_labels(embeddings_BE, labels, kind)]

    def sure_labels(self, embeddings_BE: Tensor, labels: Sequence[str], kind: Kind) -> list[tuple[str, float]]:
        """Return the closest label of each image and its probability among all labels.

        For objects, 'nothing' is a choice whether listed or not.

        Raises:
            UserError: there are fewer than two labels.
        """
        if len(labels) < 2:
            raise UserError(f"labels {list(labels)}: the judge needs at least two to choose from")
        choices = list(labels) if kind == "style" else list(dict.fromkeys([*labels, NOTHING]))
        indices, probabilities_BL = self.classify(embeddings_BE, [label_text(label, kind) for label in choices])
        return [(choices[i], float(row[i])) for i, row in zip(indices, probabilities_BL, strict=True)]

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        texts = [normalize(text) for text in texts] if self._closed else texts
        rows = []
        for start in range(0, len(texts), self.batch_size):
            ids = self._tokenizer(list(texts[start : start + self.batch_size])).to(self.device)
            rows.append(F.normalize(self._model.encode_text(ids), dim=-1))
        return torch.cat(rows) if rows else self._empty()

    def _empty(self) -> Tensor:
        return torch.empty((0, self._model.encode_text(self._tokenizer(["a"]).to(self.device)).shape[-1]))


def label_text(label: str, kind: Kind) -> str:
    """Return the text for a label: 'a deer', 'an owl', 'in the style of noto'; 'nothing' is used as it is."""
    if label == NOTHING:
        return label
    return f"in the style of {label}" if kind == "style" else phrase(label)
