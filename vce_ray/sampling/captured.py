"""Sampling on a GPU: one whole step, captured once as a CUDA graph and replayed for every token.

A step goes from hidden states through guidance and the choice of tokens to the next hidden states. Everything that
changes from one step to the next (slots, step numbers, seeds, tokens) is in tensors on the GPU, so the host only
launches the graph: it computes nothing between steps and waits for none of them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.env import CAPTURE
from vce_ray.models.base import ImageModel
from vce_ray.sampling import kernels
from vce_ray.sampling.choose import choose, guide
from vce_ray.sampling.decoder import Decoder, decoder_of
from vce_ray.sampling.layers import LayerWeights
from vce_ray.sampling.state import BatchState

logger = logging.getLogger(__name__)

MAX_CALLS_AHEAD = 2
"""The host runs at most this many calls ahead of the GPU: between calls, drawing may stop or images may join, and what
is already queued must be drawn first."""
TOLERANCE = 0.05
"""Largest relative distance of a captured step's hidden states from those of torch's operators."""


class CapturedStep:
    """A step for one batch size and one set of sampling settings.

    If fewer images are in progress, copies of the last row fill the batch. They write to free rows of the cache, and
    their tokens are thrown away.

    Args:
        model: the model to draw with. The captured graph is valid for as long as its decoder's cache is not
            reallocated; the decoder drops the step with the cache.
        images: batch size, B.
        sampling: guidance, temperature, top-k and top-p, which are part of the graph.
    """

    def __init__(self, model: ImageModel, images: int, sampling: SamplingConfig):
        self._head, self._sampling = model.image_head, sampling
        # The decoder owns this step. A strong reference back would be a cycle, and cycles wait for the garbage
        # collector: a dropped model's gigabytes would stay on the GPU until it happens to run.
        self._decoder = weakref.proxy(decoder_of(model))
        self._guided = sampling.guidance_scale != 1
        self.rows = 2 * images if self._guided else images
        device, stack = model.device, model.language_model
        self._norm = stack.norm
        self._weights = [
            LayerWeights(
                layer.input_layernorm.weight,
                _join_weights([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                _join_weights([layer.mlp.gate_proj, layer.mlp.up_proj]),
                layer.mlp.down_proj.weight,
            )
            for layer in stack.layers
        ]
        self._embeddings_VE = model.image_embeddings_VE
        # Buffers that the graph reads and writes. Their addresses are part of it, so a batch is copied in and out.
        self._slots_R, self._first_R = (torch.zeros(self.rows, dtype=torch.int64, device=device) for _ in range(2))
        self._state = BatchState.start(
            self._embeddings_VE.new_zeros(self.rows, self._embeddings_VE.shape[1]),
            torch.zeros(images, dtype=torch.int64, device=device),
            model.num_image_tokens,
        )
        self._unfinished: list[torch.cuda.Event] = []
        self._replay: Callable[[], None] | None = None
        self.valid = True
        """False if its first replay differed from torch's operators; it must not be used then."""

    @torch.no_grad()
    def prepare(self, state: BatchState) -> bool:
        """Capture the step on first use, with the images in progress, and return whether it may be used.

        The first replay is compared with the same step by torch's operators: a kernel that a new driver, GPU or
        version of Triton gets wrong would otherwise draw bad images without any error.

        Raises:
            Exception: whatever Triton raises if it cannot build a kernel (fallback.py tells this from other errors).
        """
        if self._replay is None and self.valid:
            self._load(state)
            replay = capture(self._step, self._decoder)
            self._load(state)  # capturing ran the step, and so changed the buffers
            replay()
            distance = self._distance(len(state.hidden_RE))
            if distance is None:
                return False
            self.valid = distance < TOLERANCE
            if self.valid:
                self._replay = replay
            else:
                logger.error(
                    "the captured sampling step differs from torch's operators by %.3f, more than %.2f: continuing "
                    "without it, slower. Please report this with your versions of torch and triton (%s=0 silences it)",
                    distance,
                    TOLERANCE,
                    CAPTURE.name,
                )
        return self.valid

    @torch.no_grad()
    def advance(self, state: BatchState, steps: int, last: bool) -> None:
        """Draw tokens of the images in progress and update their state.

        Args:
            steps: tokens to draw per image.
            last: whether these are the last tokens of all images. Nothing reads the very last ones, so they are chosen
                without a step.
        """
        assert self._replay is not None, "prepare() must be called first"
        self._load(state)
        for _ in range(steps - last):
            self._replay()
        if last:
            self._choose()
        for target, buffer in zip(state.tensors(), self._state.tensors()):
            target.copy_(buffer[: len(target)])
        self._decoder.advance(steps)
        self._unfinished.append(torch.cuda.Event())
        self._unfinished[-1].record()
        if len(self._unfinished) == MAX_CALLS_AHEAD:
            self._unfinished.pop(0).synchronize()

    def _load(self, state: BatchState) -> None:
        """Copy a batch into the buffers, and its last row into those beyond it."""
        sources = (*state.tensors(), self._decoder.next_slot_R, self._decoder.first_R)
        for buffer, source in zip((*self._state.tensors(), self._slots_R, self._first_R), sources):
            buffer[: len(source)] = source
            buffer[len(source) :] = source[-1:]

    def _distance(self, rows: int) -> float | None:
        """Return the relative distance of the hidden states after a replay from those of torch's operators.

        None if those are not finite: then the weights are at fault, which RollingBatch reports, and not the step.
        """
        replayed_RE, rows_per_image = self._state.hidden_RE[:rows], 2 if self._guided else 1
        last_B1 = self._state.tokens_BT.gather(1, self._state.steps_B[:, None] - 1)
        embeds_BE = F.embedding(last_B1[: rows // rows_per_image, 0], self._embeddings_VE)
        expected_RE = self._decoder.look_ahead(embeds_BE.repeat_interleave(rows_per_image, 0)).float()
        if not expected_RE.isfinite().all():
            return None
        return ((replayed_RE.float() - expected_RE).norm() / expected_RE.norm()).item()

    def _choose(self) -> Tensor:
        """Choose and record the next token of each image; return its embedding for each of the image's rows, [R, E]."""
        state = self._state
        logits = self._head(state.hidden_RE).float()
        if self._guided:
            logits = guide(logits[::2], logits[1::2], self._sampling.guidance_scale)
        state.logit_sums_B += logits.sum(-1)
        noise_BV = kernels.gumbel(state.seeds_B, state.steps_B, logits.shape[-1])
        chosen_B = choose(logits, noise_BV, self._sampling)
        state.tokens_BT.scatter_(1, state.steps_B[:, None], chosen_B[:, None])
        state.steps_B += 1
        embeds_BE = F.embedding(chosen_B, self._embeddings_VE)
        return embeds_BE.repeat_interleave(2, 0) if self._guided else embeds_BE

    def _step(self) -> None:
        """Choose a token and run it through all layers, in place on the buffers."""
        x_RE, delta_RE = self._choose(), None
        decoder, epsilon = self._decoder, self._norm.variance_epsilon
        # The feed-forward's residual is added by the next norm, which reads the stream anyway: one pass over it less.
        for weights, keys, values in zip(self._weights, *decoder.cache(self.rows), strict=True):
            normed = kernels.add_norm(x_RE, delta_RE, weights.before, epsilon)
            projected = F.linear(normed, weights.qkv)
            query = kernels.rotate_store(
                projected, decoder.cos_SD, decoder.sin_SD, self._slots_R, self._first_R, keys, values
            )
            attended = kernels.attend(query, keys, values, self._slots_R, projected.dtype)
            normed = kernels.add_norm(x_RE, F.linear(attended, weights.out), weights.between, epsilon)
            delta_RE = F.linear(kernels.gate(F.linear(normed, weights.gate_up)), weights.down)
        self._state.hidden_RE.copy_(kernels.add_norm(x_RE, delta_RE, self._norm.weight, epsilon))
        self._slots_R += 1


def capture(step: Callable[[], None], decoder: Decoder) -> Callable[[], None]:
    """Run a step once, capture it as a CUDA graph, and return the function that replays it."""
    stream, pool = decoder.capture_resources()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            # Triton compiles kernels on their first launch, which is forbidden during a capture. What this run writes
            # to the cache is written again by the first replay.
            step()
    finally:  # if a kernel cannot be built, torch's operators go on with the same cache
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Graphs share one memory pool: their temporaries do not outlive a replay, and replays never overlap.
    # "thread_local", because other threads, such as one that decodes pixels, may use the GPU during the capture.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _join_weights(parts: list[Any]) -> Tensor:
    """Return one matrix of several linear modules, turning their weights into views of it.

    One product instead of three keeps a GPU busier, and as the modules share the memory no weight is stored twice.
    """
    weights = [part.weight.detach() for part in parts]
    sizes, first = [len(weight) for weight in weights], weights[0]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    same_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if same_storage and all(weight.data_ptr() == end for weight, end in zip(weights[1:], ends, strict=False)):
        return first.as_strided((sum(sizes), first.shape[1]), first.stride())  # joined by an earlier capture
    joined = torch.cat(weights)
    for part, view in zip(parts, joined.split(sizes), strict=True):
        part.weight.data = view
    return joined
