"""Drawing on a GPU: the whole step, from hidden states over the choice of tokens to the next hidden states, captured
once as a CUDA graph and replayed for every token. The host does nothing in between, and no step waits for it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.env import CAPTURE
from vce_ray.sampling import kernels
from vce_ray.sampling.choose import choose, guide
from vce_ray.sampling.layers import LayerWeights
from vce_ray.sampling.rolling import Underway

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel

logger = logging.getLogger(__name__)

AHEAD = 2
"""The host runs at most so many calls ahead of the GPU: between two of them somebody may say stop, or join."""
TOLERANCE = 0.05
"""How far hidden states of a captured step may be from those of the plain one, relative to their length."""


def _joined_weight(parts: list[Any]) -> Tensor:
    """One matrix of several linear modules, of which they become views: no weight lies in memory twice."""
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


class CapturedStep:
    """One step for a number of pictures and one way of sampling.

    Where fewer are underway, copies of the last row are drawn for nothing, in rows of the cache that are free.

    Args:
        model: what draws; its decoder's cache must not be replaced while this is drawn with.
        pictures: B, drawn at once at most.
        sampling: guidance, temperature, top-k and top-p, fixed by the capture.
    """

    def __init__(self, model: ImageModel, pictures: int, sampling: SamplingConfig):
        self._head, self._sampling = model.image_head, sampling
        self._decoder = weakref.proxy(model.decoder)  # which holds this: a cycle would keep a dropped model's memory
        self._guided = sampling.guidance_scale != 1
        self.rows = 2 * pictures if self._guided else pictures
        device, stack = model.device, model.language_model
        self._norm = stack.norm
        self._weights = [
            LayerWeights(
                layer.input_layernorm.weight,
                _joined_weight([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                _joined_weight([layer.mlp.gate_proj, layer.mlp.up_proj]),
                layer.mlp.down_proj.weight,
            )
            for layer in stack.layers
        ]
        self._embeddings_VE = model.image_embeddings_VE
        self._slots_R, self._first_R = (torch.zeros(self.rows, dtype=torch.int64, device=device) for _ in range(2))
        seeds_B = torch.zeros(pictures, dtype=torch.int64, device=device)
        self._state = Underway(
            self._embeddings_VE.new_zeros(self.rows, self._embeddings_VE.shape[1]),
            seeds_B,
            torch.zeros_like(seeds_B),
            seeds_B.new_zeros(pictures, model.num_image_tokens),
        )
        self._behind: list[torch.cuda.Event] = []
        self._replay: Callable[[], None] | None = None
        self.sound = True
        """Whether it was as the plain step when it was captured; where not, it must not be drawn with."""

    @torch.no_grad()
    def prepare(self, state: Underway) -> bool:
        """Captures the step on what is underway, unless that is done; whether it is sound."""
        if self._replay is None and self.sound:
            self._load(state)
            replay = self._capture()
            self._load(state)
            replay()
            off = self._distance(len(state.hidden_RE))
            self.sound = off < TOLERANCE
            if self.sound:
                self._replay = replay
            else:
                logger.error(
                    "the captured drawing step is %.3f off from the plain one, the limit is %.2f: drawing goes on "
                    "without it, slower; please report this, with your versions of torch and triton (%s=0 silences it)",
                    off,
                    TOLERANCE,
                    CAPTURE.name,
                )
        return self.sound

    @torch.no_grad()
    def take(self, state: Underway, steps: int, last: bool) -> None:
        """Takes steps of what is underway, and notes them there.

        Args:
            last: whether all pictures are finished by them: their last token is chosen, and read by nothing.
        """
        assert self._replay is not None, "prepare() comes first"
        self._load(state)
        for _ in range(steps - last):
            self._replay()
        if last:
            self._choose()
        for kept, given in zip(state.tensors(), self._state.tensors()):
            kept.copy_(given[: len(kept)])
        self._decoder.advance(steps)
        self._behind.append(torch.cuda.Event())
        self._behind[-1].record()
        if len(self._behind) == AHEAD:
            self._behind.pop(0).synchronize()

    def _load(self, state: Underway) -> None:
        given = (*state.tensors(), self._decoder.next_R, self._decoder.first_R)
        for kept, source in zip((*self._state.tensors(), self._slots_R, self._first_R), given):
            kept[: len(source)] = source
            kept[len(source) :] = source[-1:]

    def _capture(self) -> Callable[[], None]:
        """Captures the step; what it returns replays it."""
        side, pool = self._decoder.capturing()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()  # compiles kernels; what it writes is written again by the first replay
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the GPU meanwhile; what graphs share in the pool does not outlive a replay
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self._run()
        return graph.replay

    def _distance(self, rows: int) -> float:
        """How far hidden states after one replay are from those that torch's own operators give for the same token."""
        found_RE, each = self._state.hidden_RE[:rows], 2 if self._guided else 1
        last_B1 = self._state.tokens_BT.gather(1, self._state.steps_B[:, None] - 1)
        embeds_RE = F.embedding(last_B1[: rows // each, 0], self._embeddings_VE).repeat_interleave(each, 0)
        expected_RE = self._decoder.look_ahead(embeds_RE).float()
        return ((found_RE.float() - expected_RE).norm() / expected_RE.norm()).item()

    def _choose(self) -> Tensor:
        """Picks each picture's next token, notes it, and gives its embedding to the picture's rows: [R, E]."""
        state = self._state
        logits = self._head(state.hidden_RE).float()
        if self._guided:
            logits = guide(logits[::2], logits[1::2], self._sampling.guidance_scale)
        noise_BV = kernels.gumbel(state.seeds_B, state.steps_B, logits.shape[-1])
        chosen_B = choose(logits, noise_BV, self._sampling)
        state.tokens_BT.scatter_(1, state.steps_B[:, None], chosen_B[:, None])
        state.steps_B += 1
        embeds_BE = F.embedding(chosen_B, self._embeddings_VE)
        return embeds_BE.repeat_interleave(2, 0) if self._guided else embeds_BE

    def _run(self) -> None:
        x_RE, delta_RE = self._choose(), None
        decoder, epsilon = self._decoder, self._norm.variance_epsilon
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
