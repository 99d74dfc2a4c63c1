"""A CLIP from a local folder in open_clip's format: image and text embeddings, zero-shot labels, prompt similarity.

Knows images and texts only: no runs, no prompt origins, no Ray. Shapes: B images, H W image height and width,
L label texts, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vce_ray.concepts.concept import Kind
from vce_ray.concepts.wording import fix_articles
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
        self._labels: dict[tuple[str, ...], Tensor] = {}
        """Embeddings of the label texts that were classified among: a run asks for the same ones again and again."""

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

        Closeness is the cosine. Probabilities are a softmax over the cosines at the model's own temperature. A model
        with a bias (SigLIP) was trained to judge each text on its own: its probabilities are sigmoids, and do not add
        up to 1.

        Raises:
            ValueError: there are no texts.
        """
        if not texts:
            raise ValueError("no label texts: give at least one")
        key = tuple(texts)
        if key not in self._labels:
            self._labels[key] = self._encode_texts(texts)
        cosines_BL = embeddings_BE @ self._labels[key].T
        scale, bias = self._model.logit_scale.exp(), getattr(self._model, "logit_bias", None)
        if bias is None:
            probabilities_BL = (scale.clamp(max=100) * cosines_BL).softmax(-1)
        else:
            probabilities_BL = (scale * cosines_BL + bias).sigmoid()
        return cosines_BL.argmax(-1).cpu().numpy(), probabilities_BL.cpu().numpy()

    def presence(self, embeddings_BE: Tensor, texts: Sequence[str], other_texts: Sequence[str]) -> np.ndarray:
        """Return the probability that an image shows what `texts` say rather than `other_texts`, float32 [B].

        The closest text of each side counts, so that the number of texts makes no difference: 0.5 or more means that
        the closest of all is one of `texts`. It is p / (p + q) for the probabilities p and q of the two.
        """
        _, probabilities_BL = self.classify(embeddings_BE, [*texts, *other_texts])
        own_B, other_B = probabilities_BL[:, : len(texts)].max(1), probabilities_BL[:, len(texts) :].max(1)
        return own_B / (own_B + other_B)

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

    def best_labels(
        self, embeddings_BE: Tensor, labels: Sequence[str], kind: Kind, or_nothing: bool = True, template: str = ""
    ) -> list[str]:
        """Return the closest label of each image; as `sure_labels` without the probabilities."""
        return [label for label, _ in self.sure_labels(embeddings_BE, labels, kind, or_nothing, template)]

    def sure_labels(
        self, embeddings_BE: Tensor, labels: Sequence[str], kind: Kind, or_nothing: bool = True, template: str = ""
    ) -> list[tuple[str, float]]:
        """Return the closest label of each image and its share of the probabilities of all labels.

        Args:
            or_nothing: for objects, 'nothing' is a choice too, whether listed or not. Unset it to choose among the
                labels alone, even if there is only one.
            template: as for `label_text`.

        Raises:
            UserError: `or_nothing` is set and there are fewer than two labels.
        """
        choices = list(labels) if kind == "style" or not or_nothing else list(dict.fromkeys([*labels, NOTHING]))
        if or_nothing and len(labels) < 2:
            raise UserError(f"labels {list(labels)}: the judge needs at least two to choose from")
        texts = [label_text(label, kind, template) for label in choices]
        indices, probabilities_BL = self.classify(embeddings_BE, texts)
        return [(choices[i], float(row[i] / row.sum())) for i, row in zip(indices, probabilities_BL, strict=True)]

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        # '<end_of_text>' in a prompt is text: open_clip would end the text there
        texts = [normalize(text) if self._closed else text.replace("<", "< ") for text in texts]
        rows = []
        for start in range(0, len(texts), self.batch_size):
            ids = self._tokenizer(list(texts[start : start + self.batch_size])).to(self.device)
            rows.append(F.normalize(self._model.encode_text(ids), dim=-1))
        return torch.cat(rows) if rows else self._empty()

    def _empty(self) -> Tensor:
        return torch.empty((0, self._model.encode_text(self._tokenizer(["a"]).to(self.device)).shape[-1]))


@cache
def clip_model(folder: Path) -> ClipModel:
    """Load a folder's model once per process: several detectors use it."""
    return ClipModel(folder)


def label_text(label: str, kind: Kind, template: str = "") -> str:
    """Return the text for a label: 'a deer', 'an owl', 'in the style of noto'; 'nothing' is used as it is.

    Args:
        template: the text with '{name}' for the label, if a concept has its own.
    """
    if label == NOTHING:
        return label
    if template:
        return fix_articles(template.replace("{name}", label))
    return f"in the style of {label}" if kind == "style" else phrase(label)
