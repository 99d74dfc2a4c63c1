"""How far images of prompts for the concept are from what the base draws of all that is kept: a kernel distance.

kid_before, kid_after: distance of the images of these prompts, before and after, to the base's images of keep prompts.
kid_floor: distance between random halves of the latter: what images of one distribution give, and its spread.

The distance is KID, the unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y/d + 1)^3, of
Binkowski et al., Demystifying MMD GANs (ICLR 2018, arXiv:1801.01401). Its features here are the judge's embeddings, of
length sqrt(d), and not Inception's, so values compare with each other under one judge and with no published KID.
Before, all images of these prompts show one concept, far from the mix of what is kept; what is drawn instead should
come near that mix. It says which things are drawn more than how well: the judge embeds a vague shape near the thing
that it resembles, and how vague it is shows in its confidence (coherence.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import NO_FIGURE, Figure, Z

MOST_IMAGES = 2000
"""Images of each side that are compared: time and memory grow with the square of their number."""
_HALVES = 100
"""Random halves that intervals are made of."""


def _measure(comparison: Comparison) -> Measured:
    rng = np.random.default_rng(0)
    kept = _features(comparison.keep.before, rng)
    before, after = (_features(rows, rng) for rows in (comparison.erase.before, comparison.erase.after))
    return Measured(
        {
            "kid_before": kid(before, kept, rng),
            "kid_after": kid(after, kept, rng),
            "kid_floor": kid_of_halves(kept, len(after), rng),
        }
    )


def kid(x_ND: np.ndarray, y_MD: np.ndarray, rng: np.random.Generator) -> Figure:
    """Return the distance of two sets of features; no figure with fewer than 4 of one.

    The interval is that of the spread over random halves of both sets (the delete-half jackknife of Shao and Wu, Annals
    of Statistics 17 (1989), 1176), around the value of all images.
    """
    if min(len(x_ND), len(y_MD)) < 4:
        return NO_FIGURE
    kernels = _kernel(x_ND, x_ND), _kernel(y_MD, y_MD), _kernel(x_ND, y_MD)
    value = _mmd(*kernels, np.ones(len(x_ND)), np.ones(len(y_MD)))
    halves = [_mmd(*kernels, _half(len(x_ND), rng), _half(len(y_MD), rng)) for _ in range(_HALVES)]
    reach = Z * float(np.sqrt(np.mean((np.array(halves) - value) ** 2)))
    return Figure(value, value - reach, value + reach, len(x_ND))


def kid_of_halves(x_ND: np.ndarray, size: int, rng: np.random.Generator) -> Figure:
    """Return the distance of two disjoint random parts of one set, each of at most `size`, with its 95% range."""
    size = min(size, len(x_ND) // 2)
    if size < 2:
        return NO_FIGURE
    kernel = _kernel(x_ND, x_ND)
    distances = []
    for _ in range(_HALVES):
        order = rng.permutation(len(x_ND))
        one, other = order[:size], order[size : 2 * size]
        parts = kernel[np.ix_(one, one)], kernel[np.ix_(other, other)], kernel[np.ix_(one, other)]
        distances.append(_mmd(*parts, np.ones(size), np.ones(size)))
    low, high = np.quantile(distances, (0.025, 0.975))
    return Figure(float(np.mean(distances)), float(low), float(high), 2 * size)


def _features(rows: Sequence[Row], rng: np.random.Generator) -> np.ndarray:
    """Return the unit embeddings of at most `MOST_IMAGES` random rows, float64 [N, D]."""
    chosen = rng.permutation(len(rows))[:MOST_IMAGES]
    return np.array([rows[index]["embedding"] for index in sorted(chosen)], np.float64)


def _kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """Return the kernel of all pairs, [N, M]: of unit vectors scaled by sqrt(d), (x.y/d + 1)^3 is (cosine + 1)^3."""
    return (x_ND @ y_MD.T + 1) ** 3


def _mmd(xx_NN: np.ndarray, yy_MM: np.ndarray, xy_NM: np.ndarray, in_x_N: np.ndarray, in_y_M: np.ndarray) -> float:
    """Return the unbiased squared MMD of the rows whose weight is 1; the others have 0."""
    n, m = in_x_N.sum(), in_y_M.sum()
    within_x = (in_x_N @ xx_NN @ in_x_N - in_x_N @ xx_NN.diagonal()) / (n * (n - 1))
    within_y = (in_y_M @ yy_MM @ in_y_M - in_y_M @ yy_MM.diagonal()) / (m * (m - 1))
    return float(within_x + within_y - 2 * (in_x_N @ xy_NM @ in_y_M) / (n * m))


def _half(number: int, rng: np.random.Generator) -> np.ndarray:
    """Return the weights of a random half of `number` rows."""
    weights = np.zeros(number)
    weights[rng.permutation(number)[: number // 2]] = 1
    return weights


KID = Metric(columns=("embedding",), measure=_measure)
