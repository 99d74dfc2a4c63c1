"""Pictures that are drawn together, each at a step of its own: others join where there is room.

A picture has a fixed number of tokens, so the host knows without asking when each is finished, and no step waits.

Shape legend: B pictures, T image tokens, R rows: B, or 2B under guidance, a picture's conditional and unconditional row
side by side; E width of the model, V image vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.sampling.choose import choose, guide
from vce_ray.sampling.device import check_kept, free_memory
from vce_ray.sampling.layers import capturable
from vce_ray.sampling.noise import gumbel_noise
from vce_ray.sampling.plan import fitting_batch, padded_batch, whole_batch

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel, PromptBatch
    from vce_ray.sampling.captured import CapturedStep

Name = TypeVar("Name", bound=Hashable)

KEPT = {"auto": None, "fp8": torch.float8_e4m3fn}
"""What `kv_cache_dtype` is to the decoder."""
NOISE_AT_ONCE = 1 << 17
"""Numbers of sampling noise that are made at once, for several steps where batch and vocabulary are small."""


@dataclass
class Underway:
    """What pictures that are being drawn have come to; the decoder has their cache."""

    hidden_RE: Tensor
    """Of each row's last token."""
    seeds_B: Tensor
    steps_B: Tensor
    """int64: tokens that each picture has."""
    tokens_BT: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, in one order."""
        return self.hidden_RE, self.seeds_B, self.steps_B, self.tokens_BT


class RollingBatch(Generic[Name]):
    """Pictures underway, each under a name; at most `sampling.batch_size`, or what fits into memory. It has the model's
    decoder to itself.

    A picture depends on its own prompt, seed and the settings alone, whatever else is drawn beside it, up to the last
    bits of floating-point sums, which differ with the shape of a batch: in bfloat16 these can change a token now and
    then.
    """

    def __init__(self, model: ImageModel, sampling: SamplingConfig, reserve: bool = False):
        """
        Args:
            reserve: makes the cache for as many pictures as there is room for when the first one joins; else it grows
                with those that join.

        Raises:
            UserError: the device has no numbers of the kind that `sampling` wants kept.
        """
        self._model, self._sampling, self._reserve = model, sampling, reserve
        check_kept(sampling.kv_cache_dtype, model.device)
        self._guided = sampling.guidance_scale != 1
        self._rows_each = 2 if self._guided else 1
        self._names: list[Name] = []
        self._taken: list[int] = []  # steps_B, known to the host
        self._largest, self._captured = sampling.batch_size, False
        self._longest = model.prompt_tokens
        """Tokens that the cache has room for in each row's prompt."""
        self._clear()

    def __len__(self) -> int:
        return len(self._names)

    @torch.no_grad()
    def join(self, names: Sequence[Name], prompts: Sequence[str], seeds: Sequence[int]) -> int:
        """Begins pictures; how many of them, from the first on: as many as there is room for, and one at least where
        nothing is underway.

        Raises:
            UserError: a prompt is empty or too long.
        """
        model = self._model
        if not self:
            self._clear()
            self._measure()
        room = self._largest - len(self)
        prompts, seeds = prompts[:room], seeds[:room]
        if not prompts:
            return 0
        distinct = list(dict.fromkeys(prompts))
        batch = model.encode_prompts(distinct)
        longest = max(self._longest, batch.mask_BP.shape[1])
        largest = self._largest if longest == self._longest else self._capacity(longest)
        if largest - len(self) < len(prompts):
            room = max(0, largest - len(self))
            return self.join(names, prompts[:room], seeds[:room])
        self._longest, self._largest = longest, largest
        embeds_UPE, lengths_U, first_U, rows_UG = _rows(batch, self._guided)
        place = {prompt: i for i, prompt in enumerate(distinct)}
        of_row_R = rows_UG[[place[prompt] for prompt in prompts]].flatten()
        total = len(self) + len(prompts)
        whole = largest if self._reserve else padded_batch(total, largest) if self._captured else total
        # a captured step reads the last token of pictures that are finished while others go on, too
        new_tokens = model.num_image_tokens if self._captured else model.num_image_tokens - 1
        spare_rows = (whole - total) * self._rows_each
        hidden_RE = model.decoder.join(embeds_UPE, lengths_U, first_U, of_row_R, new_tokens, spare_rows)
        seeds_B = torch.tensor(seeds, dtype=torch.int64, device=model.device)
        begun = Underway(
            hidden_RE, seeds_B, torch.zeros_like(seeds_B), seeds_B.new_zeros(len(seeds), model.num_image_tokens)
        )
        pairs = zip(self._state.tensors(), begun.tensors())
        self._state = Underway(*(torch.cat(pair) for pair in pairs)) if self else begun
        self._names += names[: len(prompts)]
        self._taken += [0] * len(prompts)
        return len(prompts)

    @torch.no_grad()
    def advance(self, steps: int) -> list[tuple[Name, Tensor]]:
        """Draws so many more tokens of each picture, fewer where one is finished before.

        Returns:
            the names of pictures that are finished, and their tokens, int64 [T] on the host; they have left.
        """
        assert self, "nothing is underway"
        steps = min(steps, self._model.num_image_tokens - max(self._taken))
        if step := self._captured_step():
            step.take(self._state, steps, last=min(self._taken) + steps == self._model.num_image_tokens)
            self._taken = [taken + steps for taken in self._taken]
            return self._finished()
        finished = []
        for noise_BV in self._noise(steps):
            tokens_B1 = self._choose(noise_BV)[:, None]
            self._state.tokens_BT.scatter_(1, self._state.steps_B[:, None], tokens_B1)
            self._state.steps_B += 1
            self._taken = [taken + 1 for taken in self._taken]
            finished = self._finished()
            if self:  # the last token of a picture is read by nothing
                last_B = self._state.tokens_BT.gather(1, self._state.steps_B[:, None] - 1)[:, 0]
                embeds_BE = F.embedding(last_B, self._model.image_embeddings_VE)
                self._state.hidden_RE = self._model.decoder.step(embeds_BE.repeat_interleave(self._rows_each, 0))
        return finished

    def drop(self, names: Sequence[Name]) -> None:
        """Gives pictures up; those that are not underway are passed over."""
        gone = set(names)
        self._keep([i for i, name in enumerate(self._names) if name not in gone])

    def _captured_step(self) -> CapturedStep | None:
        if not self._captured:
            return None
        step = self._model.decoder.captured(self._model, padded_batch(len(self), self._largest), self._sampling)
        return step if step.prepare(self._state) else None

    def _choose(self, noise_BV: Tensor) -> Tensor:
        logits = self._model.decoder.logits(self._state.hidden_RE)
        if self._guided:
            logits = guide(logits[::2], logits[1::2], self._sampling.guidance_scale)
        return choose(logits, noise_BV, self._sampling)

    def _noise(self, steps: int) -> Iterator[Tensor]:
        """Sampling noise of the next steps, one after the other, [B, V]; made for several at once where it is small."""
        seeds_B, vocabulary = self._state.seeds_B, self._model.image_vocab_size
        steps_NB = self._state.steps_B + torch.arange(steps, device=seeds_B.device)[:, None]
        for part in steps_NB.split(max(1, NOISE_AT_ONCE // (len(self) * vocabulary))):
            yield from gumbel_noise(seeds_B, part, vocabulary)

    def _finished(self) -> list[tuple[Name, Tensor]]:
        """Lets finished pictures leave."""
        done = [i for i, taken in enumerate(self._taken) if taken == self._model.num_image_tokens]
        if not done:
            return []
        drawn = list(zip([self._names[i] for i in done], self._state.tokens_BT[done].cpu()))
        self._keep([i for i, taken in enumerate(self._taken) if taken < self._model.num_image_tokens])
        return drawn

    def _keep(self, pictures: list[int]) -> None:
        """Forgets all but these, and fills the places of others from the end: the fewest rows are copied."""
        stay, count = set(pictures), len(pictures)
        later = [i for i in pictures if i >= count]
        order = [i if i in stay else later.pop() for i in range(count)]
        if order == list(range(len(self))):
            return
        if not order:
            self._clear()
            return
        rows = [self._rows_each * i + k for i in order for k in range(self._rows_each)]
        self._model.decoder.keep(rows)
        hidden_RE, *others = self._state.tensors()
        self._state = Underway(hidden_RE[rows], *(tensor[order] for tensor in others))
        self._names, self._taken = [self._names[i] for i in order], [self._taken[i] for i in order]

    def _clear(self) -> None:
        self._model.decoder.keep([])
        self._names, self._taken = [], []
        nothing = torch.empty(0, dtype=torch.int64)
        self._state = Underway(nothing, nothing, nothing, nothing)

    def _measure(self) -> None:
        """How many pictures there is room for, and whether steps are captured. A cache that was made for longer prompts
        is kept unless it takes room from others."""
        decoder, tokens = self._model.decoder, self._model.num_image_tokens
        decoder.kept_dtype = KEPT[self._sampling.kv_cache_dtype]
        decoder.prepare()
        self._captured = capturable(self._model.language_model)
        usual = self._model.prompt_tokens
        self._longest = max(usual, decoder.slots - tokens)
        self._largest = self._capacity(self._longest)
        if self._largest < self._sampling.batch_size and decoder.slots > decoder.whole_slots(usual + tokens):
            decoder.release()
            self._longest, self._largest = usual, self._capacity(usual)

    def _capacity(self, prompt_tokens: int) -> int:
        """How many pictures with prompts of up to so many tokens there is room for; one at least."""
        slots = self._model.decoder.whole_slots(prompt_tokens + self._model.num_image_tokens)
        shape = replace(
            self._model.shape,
            prompt_tokens=slots - self._model.num_image_tokens,
            kv_cache_dtype=self._sampling.kv_cache_dtype,
        )
        free = free_memory(self._model.device) + self._model.decoder.cache_bytes
        fitting = fitting_batch(shape, free, self._guided, loaded=True)
        if fitting >= self._sampling.batch_size:
            return self._sampling.batch_size
        return whole_batch(fitting) if self._captured else max(1, fitting)


def _rows(batch: PromptBatch, guided: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the decoder reads first: embeddings (padded on the right), lengths and first positions of what is distinct,
    and which of them the rows of each prompt are: [prompts, rows of each].

    An unconditional row depends on its length alone, so prompts of one length share theirs.
    """
    lengths_B, width = batch.mask_BP.sum(1), batch.mask_BP.shape[1]
    place_BP = (torch.arange(width, device=lengths_B.device) + (width - lengths_B)[:, None]) % width
    embeds_BPE, unconditional_BPE = (
        embeds.gather(1, place_BP[..., None].expand_as(embeds))
        for embeds in (batch.embeds_BPE, batch.unconditional_BPE)
    )
    own = torch.arange(len(batch), device=lengths_B.device)
    if not guided:
        return embeds_BPE, lengths_B, batch.first_B, own[:, None]
    lengths_L, of_length_B = lengths_B.unique(return_inverse=True)
    one_L = torch.stack([(lengths_B == length).nonzero()[0, 0] for length in lengths_L])
    return (
        torch.cat([embeds_BPE, unconditional_BPE[one_L]]),
        torch.cat([lengths_B, lengths_L]),
        torch.cat([batch.first_B, batch.first_B[one_L]]),
        torch.stack([own, len(batch) + of_length_B], dim=1),
    )
