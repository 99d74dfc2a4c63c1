"""What a step trains on: a pure function of (seed, step), so any worker, or a resumed run, sees the same rows.

Knows the columns of the pair set, no Ray and no files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vce_ray.config import TrainConfig
from vce_ray.errors import UserError
from vce_ray.training.step import AnchorBatch, KeepBatch, PairBatch

KEEP_BLANK = 0.2
"""Share of preservation images seen without their prompt: guidance needs the unconditional side kept too."""


def matrix(column: pa.ChunkedArray, dtype: type) -> Tensor:
    """A list column of equal lengths as a tensor [rows, length]."""
    return torch.from_numpy(np.stack(column.to_numpy()).astype(dtype))


def order(count: int, wanted: range, seed: int) -> list[int]:
    """Row numbers at places `wanted` of an endless sequence that shuffles all `count` rows anew each epoch."""
    epochs: dict[int, list[int]] = {}
    rows = []
    for place in wanted:
        epoch, offset = divmod(place, count)
        if epoch not in epochs:
            epochs[epoch] = random.Random(f"{seed}-{epoch}").sample(range(count), count)
        rows.append(epochs[epoch][offset])
    return rows


@dataclass(frozen=True)
class TrainingData:
    """The pair set with its reference log-probs, and the keep set, in memory (tokens only, no images)."""

    prompts: list[str]
    refined: list[str]
    chosen: Tensor
    rejected: Tensor
    references: dict[str, tuple[Tensor, Tensor]]
    """Mode -> (chosen, rejected) log-probs of the reference, float32 [pairs, T]."""
    keep_prompts: list[str]
    keep_tokens: Tensor

    @classmethod
    def from_tables(cls, pairs: pa.Table, reference: pa.Table, keep: pa.Table, config: TrainConfig) -> TrainingData:
        """Joins pairs and reference log-probs by pair_id.

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
            for mode in config.prompt_modes
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

    def pair_batch(self, step: int, rank: int, workers: int, config: TrainConfig, seed: int) -> PairBatch:
        """This worker's share of the pairs of a step."""
        share = config.batch_size // workers
        start = step * config.batch_size + rank * share
        rows = order(len(self.prompts), range(start, start + share), seed)
        modes = [random.Random(f"{seed}-{step}-{row}").choice(config.prompt_modes) for row in rows]
        picked = [[self.references[mode][side][row] for row, mode in zip(rows, modes, strict=True)] for side in (0, 1)]
        texts = [self.refined[r] if m == "stripped" else self.prompts[r] for r, m in zip(rows, modes, strict=True)]
        return PairBatch(
            texts,
            [mode == "null" for mode in modes],
            torch.tensor([seed * 1_000_003 + row for row in rows]),
            self.chosen[rows],
            self.rejected[rows],
            torch.stack(picked[0]),
            torch.stack(picked[1]),
        )

    def keep_batch(self, step: int, rank: int, workers: int, config: TrainConfig, seed: int) -> KeepBatch:
        """This worker's share of the preservation images of a step."""
        share = config.keep_batch_size // workers
        start = step * config.keep_batch_size + rank * share
        rows = order(len(self.keep_prompts), range(start, start + share), seed + 1)
        blank = [random.Random(f"{seed}-{step}-{row}-keep").random() < KEEP_BLANK for row in rows]
        return KeepBatch(rows, [self.keep_prompts[row] for row in rows], blank, self.keep_tokens[rows])

    def anchor_batch(self, step: int, rank: int, workers: int, config: TrainConfig, seed: int) -> AnchorBatch:
        """This worker's share of the pairs of a step, as the anchor wants them."""
        share = config.batch_size // workers
        start = step * config.batch_size + rank * share
        rows = order(len(self.prompts), range(start, start + share), seed)
        prompts, refined = ([texts[row] for row in rows] for texts in (self.prompts, self.refined))
        return AnchorBatch(rows, prompts, refined, self.chosen[rows])
