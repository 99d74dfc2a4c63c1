"""Training data in memory, and the batches of each step.

A batch is a pure function of (seed, step), so every worker, and a resumed run, sees the same rows. Knows the columns
of the pair set, but neither Ray nor files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vce_ray.errors import UserError
from vce_ray.training.terms.batches import AnchorBatch, KeepBatch, PairBatch

KEEP_BLANK = 0.2
"""Share of preservation images seen without their prompt: guidance also uses the unconditional side."""


@dataclass(frozen=True)
class Share:
    """Which part of every batch is this worker's, and the seed that orders all batches."""

    rank: int
    workers: int
    seed: int

    def rows(self, step: int, batch_size: int) -> range:
        """Places of this worker's rows of a step in the endless sequence of rows."""
        size = batch_size // self.workers
        start = step * batch_size + self.rank * size
        return range(start, start + size)


def matrix(column: pa.ChunkedArray, dtype: type) -> Tensor:
    """Return a list column of equal lengths as a tensor [rows, length]."""
    return torch.from_numpy(np.stack(column.to_numpy()).astype(dtype))


def order(count: int, places: range, seed: int) -> list[int]:
    """Return the row numbers at `places` of an endless sequence that reshuffles all `count` rows every epoch."""
    epochs: dict[int, list[int]] = {}
    rows = []
    for place in places:
        epoch, offset = divmod(place, count)
        if epoch not in epochs:
            epochs[epoch] = random.Random(f"{seed}-{epoch}").sample(range(count), count)
        rows.append(epochs[epoch][offset])
    return rows


@dataclass(frozen=True)
class TrainingData:
    """The pair set with its reference log-probs, and the preservation set: tokens only, no images."""

    prompts: list[str]
    refined: list[str]
    chosen: Tensor
    rejected: Tensor
    references: dict[str, tuple[Tensor, Tensor]]
    """Prompt mode -> (chosen, rejected) log-probs of the reference, float32 [pairs, T]."""
    keep_prompts: list[str]
    keep_tokens: Tensor

    @classmethod
    def from_tables(
        cls, pairs: pa.Table, reference: pa.Table, keep: pa.Table, prompt_modes: tuple[str, ...]
    ) -> TrainingData:
        """Join pairs and reference log-probs by pair_id.

        Raises:
            UserError: a pair has no reference log-probs, or there are no pairs.
        """
        if pairs.num_rows == 0:
            raise UserError("the pair set is empty: every pair was rejected; see rejects/ for the reasons")
        rows = {pair_id: i for i, pair_id in enumerate(reference["pair_id"].to_pylist())}
        missing = [pair_id for pair_id in pairs["pair_id"].to_pylist() if pair_id not in rows]
        if missing:
            raise UserError(f"{len(missing)} pairs have no reference log-probs, the first is {missing[0]}")
        reference = reference.take([rows[pair_id] for pair_id in pairs["pair_id"].to_pylist()])
        references = {
            mode: (
                matrix(reference[f"chosen_{mode}"], np.float32),
                matrix(reference[f"rejected_{mode}"], np.float32),
            )
            for mode in prompt_modes
        }
        return cls(
            pairs["prompt"].to_pylist(),
            pairs["refined_caption"].to_pylist(),
            matrix(pairs["chosen"], np.int64),
            matrix(pairs["rejected"], np.int64),
            references,
            keep["prompt"].to_pylist(),
            matrix(keep["tokens"], np.int64) if keep.num_rows else torch.empty(0, 0, dtype=torch.long),
        )

    def pair_batch(self, step: int, share: Share, batch_size: int, prompt_modes: tuple[str, ...]) -> PairBatch:
        """Return this worker's pairs of a step, each under one of the prompt modes."""
        rows = self._pair_rows(step, share, batch_size)
        modes = [random.Random(f"{share.seed}-{step}-{row}").choice(prompt_modes) for row in rows]
        log_probs = [[self.references[mode][side][row] for row, mode in zip(rows, modes)] for side in (0, 1)]
        texts = [self.refined[row] if mode == "stripped" else self.prompts[row] for row, mode in zip(rows, modes)]
        return PairBatch(
            texts,
            [mode == "null" for mode in modes],
            torch.tensor([share.seed * 1_000_003 + row for row in rows]),
            self.chosen[rows],
            self.rejected[rows],
            torch.stack(log_probs[0]),
            torch.stack(log_probs[1]),
        )

    def keep_batch(self, step: int, share: Share, batch_size: int) -> KeepBatch:
        """Return this worker's preservation images of a step, some of them without their prompt."""
        rows = order(len(self.keep_prompts), share.rows(step, batch_size), share.seed + 1)
        blank = [random.Random(f"{share.seed}-{step}-{row}-keep").random() < KEEP_BLANK for row in rows]
        return KeepBatch(rows, [self.keep_prompts[row] for row in rows], blank, self.keep_tokens[rows])

    def anchor_batch(self, step: int, share: Share, batch_size: int) -> AnchorBatch:
        """Return the pairs of `pair_batch` as the anchor needs them."""
        rows = self._pair_rows(step, share, batch_size)
        prompts, refined = ([texts[row] for row in rows] for texts in (self.prompts, self.refined))
        return AnchorBatch(rows, prompts, refined, self.chosen[rows])

    def _pair_rows(self, step: int, share: Share, batch_size: int) -> list[int]:
        return order(len(self.prompts), share.rows(step, batch_size), share.seed)
