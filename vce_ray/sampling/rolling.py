"""Images drawn together, each at its own step: new ones join whenever there is room.

Every image has the same number of tokens, so the host knows when each is finished without asking the GPU.

Shape legend: B images, T image tokens, R rows: B, or 2B under guidance, where the conditional and the unconditional row
of an image are neighbours; E width of the model, V image vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models.base import ImageModel, PromptBatch, roll_rows
from vce_ray.sampling.choose import choose, guide
from vce_ray.sampling.decoder import decoder_of
from vce_ray.sampling.fallback import give_up, is_build_failure
from vce_ray.sampling.layers import capturable
from vce_ray.sampling.memory import check_cache_dtype, fitting_batch, free_memory, padded_batch, whole_batch
from vce_ray.sampling.noise import gumbel_noise
from vce_ray.sampling.state import BatchState

if TYPE_CHECKING:
    from vce_ray.sampling.captured import CapturedStep

Name = TypeVar("Name", bound=Hashable)

CACHE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}
"""`Decoder.cache_dtype` by `kv_cache_dtype` of SamplingConfig."""
NOISE_BLOCK = 1 << 17
"""Numbers of sampling noise generated at once: several steps' worth, if batch and vocabulary are small."""


class RollingBatch(Generic[Name]):
    """Images in progress, each under a name: at most `sampling.batch_size`, or as many as fit into memory.

    A model has one decoder, so it serves one batch at a time: while a batch has images in progress, no other one of the
    same model may start any, in this thread or another. An error in `advance` drops all images in progress.

    An image depends only on its prompt, its seed and the settings, not on the images drawn beside it, up to the last
    bits of floating-point sums, whose order depends on the batch size: in bfloat16 this occasionally changes a token.
    """

    def __init__(
        self, model: ImageModel, sampling: SamplingConfig, reserve: bool = False, memory_limit: float | None = None
    ):
        """
        Args:
            reserve: allocate the cache for the largest batch when the first image joins, instead of growing it with
                every image that joins.
            memory_limit: bytes that cache and logits may take. By default, all that is free on the device.

        Raises:
            UserError: the device does not support the cache dtype of `sampling`.
        """
        self._model, self._sampling, self._reserve = model, sampling, reserve
        self._decoder, self._memory_limit = decoder_of(model), memory_limit
        check_cache_dtype(sampling.kv_cache_dtype, model.device)
        self._guided = sampling.guidance_scale != 1
        self._rows_per_image = 2 if self._guided else 1
        self._names: list[Name] = []
        self._drawn: list[int] = []  # steps_B, known to the host
        self._max_images, self._captured = sampling.batch_size, False
        self._max_prompt_tokens = model.prompt_tokens
        """Prompt length that every row of the cache has room for."""
        self._state = _empty_state()

    def __len__(self) -> int:
        return len(self._names)

    @torch.no_grad()
    def join(self, names: Sequence[Name], prompts: Sequence[str], seeds: Sequence[int]) -> int:
        """Start drawing images, in the order given, as many as there is room for.

        Returns:
            How many were started: at least one if none was in progress.

        Raises:
            UserError: a prompt is empty or too long.
            RuntimeError: another batch of this model has images in progress.
        """
        self._decoder.start_batch(self)
        try:
            return self._join(names, prompts, seeds)
        finally:
            # Nothing was started, or an allocation failed half-way and left rows without an image.
            if not self or self._decoder.rows != len(self) * self._rows_per_image:
                self._clear()

    def _join(self, names: Sequence[Name], prompts: Sequence[str], seeds: Sequence[int]) -> int:
        model = self._model
        if not self:
            self._plan_capacity()
        room = self._max_images - len(self)
        prompts, seeds = prompts[:room], seeds[:room]
        if not prompts:
            return 0
        distinct = list(dict.fromkeys(prompts))
        batch = model.encode_prompts(distinct)
        max_prompt_tokens, max_images = max(self._max_prompt_tokens, batch.mask_BP.shape[1]), self._max_images
        if max_prompt_tokens > self._max_prompt_tokens:
            # a longer prompt lengthens every row of the cache, so fewer rows fit: try again with fewer images
            max_images = self._capacity(max_prompt_tokens)
        if max_images - len(self) < len(prompts):
            room = max(0, max_images - len(self))
            return self._join(names, prompts[:room], seeds[:room])
        self._max_prompt_tokens, self._max_images = max_prompt_tokens, max_images
        embeds_UPE, lengths_U, first_U, rows_UG = _distinct_rows(batch, self._guided)
        index = {prompt: i for i, prompt in enumerate(distinct)}
        prompt_of_row_R = rows_UG[[index[prompt] for prompt in prompts]].flatten()
        total = len(self) + len(prompts)
        capacity = max_images if self._reserve else padded_batch(total, max_images) if self._captured else total
        # a captured step also reads the last token of images that are finished while others continue
        new_tokens = model.num_image_tokens if self._captured else model.num_image_tokens - 1
        spare_rows = (capacity - total) * self._rows_per_image
        hidden_RE = self._decoder.join(embeds_UPE, lengths_U, first_U, prompt_of_row_R, new_tokens, spare_rows)
        seeds_B = torch.tensor(seeds, dtype=torch.int64, device=model.device)
        new = BatchState.start(hidden_RE, seeds_B, model.num_image_tokens)
        pairs = zip(self._state.tensors(), new.tensors())
        self._state = BatchState(*(torch.cat(pair) for pair in pairs)) if self else new
        self._names += names[: len(prompts)]
        self._drawn += [0] * len(prompts)
        return len(prompts)

    @torch.no_grad()
    def advance(self, steps: int) -> list[tuple[Name, Tensor]]:
        """Draw this many more tokens of each image, or fewer, so that none runs past its last token.

        Returns:
            Names and tokens, int64 [T] on the host, of the images that are now finished. They leave the batch.

        Raises:
            UserError: images are finished that had NaN or infinite logits at some step.
        """
        assert self, "no image is in progress"
        try:
            return self._advance(steps)
        except BaseException:  # the state may be that of half a step, and other batches must be able to start
            self._clear()
            raise

    def _advance(self, steps: int) -> list[tuple[Name, Tensor]]:
        steps = min(steps, self._model.num_image_tokens - max(self._drawn))
        if step := self._captured_step():
            step.advance(self._state, steps, last=min(self._drawn) + steps == self._model.num_image_tokens)
            self._drawn = [drawn + steps for drawn in self._drawn]
            return self._pop_finished()
        finished = []
        for noise_BV in self._noise(steps):
            tokens_B1 = self._choose(noise_BV)[:, None]
            self._state.tokens_BT.scatter_(1, self._state.steps_B[:, None], tokens_B1)
            self._state.steps_B += 1
            self._drawn = [drawn + 1 for drawn in self._drawn]
            finished = self._pop_finished()
            if self:  # nothing reads the last token of an image
                last_B = self._state.tokens_BT.gather(1, self._state.steps_B[:, None] - 1)[:, 0]
                embeds_BE = F.embedding(last_B, self._model.image_embeddings_VE)
                self._state.hidden_RE = self._decoder.step(embeds_BE.repeat_interleave(self._rows_per_image, 0))
        return finished

    def drop(self, names: Sequence[Name]) -> None:
        """Stop drawing images. Names that are not in progress are ignored."""
        dropped = set(names)
        self._keep([i for i, name in enumerate(self._names) if name not in dropped])

    def _captured_step(self) -> CapturedStep | None:
        if not self._captured:
            return None
        images, sampling = padded_batch(len(self), self._max_images), self._sampling
        try:
            from vce_ray.sampling.captured import CapturedStep  # imports Triton, which only machines with a GPU need

            step = self._decoder.captured_step(images, sampling, lambda: CapturedStep(self._model, images, sampling))
            return step if step.prepare(self._state) else None
        except Exception as error:
            if not is_build_failure(error):
                raise
            give_up(error)
            self._captured = False
            return None

    def _choose(self, noise_BV: Tensor) -> Tensor:
        logits = self._decoder.logits(self._state.hidden_RE)
        if self._guided:
            logits = guide(logits[::2], logits[1::2], self._sampling.guidance_scale)
        self._state.logit_sums_B += logits.sum(-1)
        return choose(logits, noise_BV, self._sampling)

    def _noise(self, steps: int) -> Iterator[Tensor]:
        """Yield the sampling noise of the next steps, [B, V] each, generated in blocks of several steps if small."""
        seeds_B, vocabulary = self._state.seeds_B, self._model.image_vocab_size
        steps_NB = self._state.steps_B + torch.arange(steps, device=seeds_B.device)[:, None]
        for part in steps_NB.split(max(1, NOISE_BLOCK // (len(self) * vocabulary))):
            yield from gumbel_noise(seeds_B, part, vocabulary)

    def _pop_finished(self) -> list[tuple[Name, Tensor]]:
        """Remove finished images and return their names and tokens.

        Raises:
            UserError: images among them had NaN or infinite logits. Only now is this checked: reading the sums before
                would wait for the GPU, and reading the tokens does anyway.
        """
        done = [i for i, drawn in enumerate(self._drawn) if drawn == self._model.num_image_tokens]
        if not done:
            return []
        finished = list(zip([self._names[i] for i in done], self._state.tokens_BT[done].cpu()))
        if failed := int((~self._state.logit_sums_B[done].isfinite()).sum()):
            # The cache holds NaN now. Zeroed anew, because masked slots count too: 0 times NaN is NaN.
            self._decoder.keep([])
            self._decoder.release()
            raise UserError(
                f"{failed} of {len(done)} images had NaN or infinite logits: the weights or the adapter are damaged, "
                "as after a training that diverged, or float16 overflows. Check that the files are complete, use "
                "another adapter, or use bfloat16 or float32"
            )
        self._keep([i for i, drawn in enumerate(self._drawn) if drawn < self._model.num_image_tokens])
        return finished

    def _keep(self, images: list[int]) -> None:
        """Drop all images but these. The last ones move into the gaps, so that few rows of the cache are copied."""
        kept, count = set(images), len(images)
        moving = [i for i in images if i >= count]
        order = [i if i in kept else moving.pop() for i in range(count)]
        if order == list(range(len(self))):
            return
        if not order:
            self._clear()
            return
        rows = [self._rows_per_image * i + k for i in order for k in range(self._rows_per_image)]
        self._decoder.keep(rows)
        hidden_RE, *others = self._state.tensors()
        self._state = BatchState(hidden_RE[rows], *(tensor[order] for tensor in others))
        self._names, self._drawn = [self._names[i] for i in order], [self._drawn[i] for i in order]

    def _clear(self) -> None:
        self._names, self._drawn, self._state = [], [], _empty_state()
        self._decoder.end_batch(self)

    def _plan_capacity(self) -> None:
        """Determine how many images fit and whether steps are captured, before the first image joins.

        A cache that was allocated for longer prompts is kept, unless its longer rows leave room for fewer images.
        """
        decoder, tokens = self._decoder, self._model.num_image_tokens
        decoder.cache_dtype = CACHE_DTYPES[self._sampling.kv_cache_dtype]
        decoder.prepare()
        self._captured = capturable(self._model.language_model)
        usual = self._model.prompt_tokens
        self._max_prompt_tokens = max(usual, decoder.slots - tokens)
        self._max_images = self._capacity(self._max_prompt_tokens)
        if self._max_images < self._sampling.batch_size and decoder.slots > decoder.whole_slots(usual + tokens):
            decoder.release()
            self._max_prompt_tokens, self._max_images = usual, self._capacity(usual)

    def _capacity(self, prompt_tokens: int) -> int:
        """Return how many images with prompts of at most this length fit into memory; at least 1."""
        slots = self._decoder.whole_slots(prompt_tokens + self._model.num_image_tokens)
        shape = replace(
            self._model.shape,
            prompt_tokens=slots - self._model.num_image_tokens,
            kv_cache_dtype=self._sampling.kv_cache_dtype,
        )
        memory = self._memory_limit
        if memory is None:  # the present cache counts as free: it is used again, or freed before a new one is allocated
            memory = free_memory(self._model.device) + self._decoder.cache_bytes
        fitting = fitting_batch(shape, memory, self._guided, loaded=True)
        if fitting >= self._sampling.batch_size:
            return self._sampling.batch_size
        return whole_batch(fitting) if self._captured else max(1, fitting)


def _empty_state() -> BatchState:
    return BatchState.start(torch.empty(0), torch.empty(0, dtype=torch.int64), 0)


def _distinct_rows(batch: PromptBatch, guided: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the distinct rows that the decoder must read, and which of them each prompt uses.

    An unconditional row depends only on its length, so all prompts of one length share theirs.

    Returns:
        embeds_UPE padded on the right, lengths_U, first_U, and indices into these: int64 [prompts, rows per image].
    """
    lengths_B, width = batch.mask_BP.sum(1), batch.mask_BP.shape[1]
    embeds_BPE, unconditional_BPE = (
        roll_rows(embeds, width - lengths_B) for embeds in (batch.embeds_BPE, batch.unconditional_BPE)
    )
    conditional = torch.arange(len(batch), device=lengths_B.device)
    if not guided:
        return embeds_BPE, lengths_B, batch.first_B, conditional[:, None]
    lengths_L, length_of_B = lengths_B.unique(return_inverse=True)
    example_L = torch.stack([(lengths_B == length).nonzero()[0, 0] for length in lengths_L])
    return (
        torch.cat([embeds_BPE, unconditional_BPE[example_L]]),
        torch.cat([lengths_B, lengths_L]),
        torch.cat([batch.first_B, batch.first_B[example_L]]),
        torch.stack([conditional, len(batch) + length_of_B], dim=1),
    )
