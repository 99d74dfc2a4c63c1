"""The verdict on an erasure: the state of each limit, how sure it is, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from vce_ray.evaluation.formats import change, change_interval, interval, limit, percent, points
from vce_ray.evaluation.metrics.limits import (
    LIMITS,
    OF_ERASE_PROMPTS,
    POINTS,
    WORST,
    applies,
    figure_of,
    missed_limits,
    undecided_limits,
    worst,
)

TITLES = {
    "seen_after": "concept seen",
    "worst_neighbour_drop": "worst neighbour",
    "kept_drop": "all neighbours",
    "score_drop": "image-text score",
    "worst_asked_drop": "rest of prompt",
    "unclear_after": "no clear object",
}
"""What each limit bounds; other limits are shown by name."""

MOST_IMAGES = 100_000
"""More images are never suggested."""


@dataclass(frozen=True)
class LimitState:
    """A limit, what was measured, and whether the erasure stays within it; numbers are texts."""

    name: str
    """Key of `LIMITS`."""
    title: str
    state: Literal["met", "undecided", "missed"]
    value: str
    """A share, or, if the limit bounds a drop, a change: negative is a loss. With its unit."""
    bound: str
    interval: str | None
    """95% interval of the value, without its unit; None if none was measured."""
    worst: str | None
    """Of a limit on each of several rows, such as neighbours, the one that lost most, whose change is `value`."""
    widest: str | None
    """The row with this interval, if it is not the one that lost most."""

    @property
    def unit(self) -> str:
        """What follows a number: ' points' or '%'."""
        return " points" if self.name in POINTS else "%"


def limit_states(metrics: dict[str, Any]) -> list[LimitState]:
    """Return the state of each limit that applies, in the order of `LIMITS`.

    By its 95% interval a limit is *met* if all of it is within the limit, *missed* if all of it is beyond, and else
    *undecided*: these images do not show which.
    """
    missed, undecided = missed_limits(metrics), undecided_limits(metrics)
    states = []
    for name in LIMITS:
        if not applies(name, metrics):
            continue
        value, figure, sure = metrics[name], figure_of(name, metrics), None
        lost_most = worst(name, metrics) if name in WORST else None
        widest = figure["name"] if lost_most and figure and figure["name"] != lost_most else None
        if name.endswith("_drop"):
            shown, bound = points(value) if name in POINTS else change(value), f"at most {limit(name)} lost"
        else:
            shown, bound = percent(value), f"at most {limit(name)}"
        if figure:
            sure = change_interval(figure) if name.endswith("_drop") else interval(figure)
        state = "missed" if name in missed else "undecided" if name in undecided else "met"
        states.append(LimitState(name, TITLES.get(name, name), state, shown, bound, sure, lost_most, widest))
    return states


def verdict_lines(metrics: dict[str, Any]) -> list[str]:
    """Return lines for a terminal: one for each limit that applies, and then the next steps."""
    lines = []
    for each in limit_states(metrics):
        line = f"{each.state:<11}{each.title:<18}{each.value:>12}   {each.bound}"
        if each.interval:
            line = f"{line:<68}95% interval {each.interval}"
        if each.widest:
            line += f" ({each.widest})"
        lines.append(line)
    return lines + [f"next: {step}" for step in next_steps(metrics)]


def next_steps(metrics: dict[str, Any]) -> list[str]:
    """Return what to do next, at least one step, each with the flags that it needs."""
    missed, undecided = missed_limits(metrics), undecided_limits(metrics)
    steps = []
    before, after = figure_of("seen_before", metrics), figure_of("seen_after", metrics)
    if metrics["seen_before"] <= LIMITS["seen_after"]:
        steps.append(
            f"the base draws the concept in {percent(metrics['seen_before'])} of the images that ask for it: look at "
            "them in the report; there is nothing to erase, or the judge does not recognize it"
        )
    for judge in metrics.get("judges", ()):
        if missing := sum(judge["unanswered"].values()):
            steps.append(
                f"{judge['judge']} answered neither yes nor no about {missing} of the images, which count as seen: "
                "give another model as --judge, under a new --name"
            )
    too_much = set(missed) - set(OF_ERASE_PROMPTS)
    if "seen_after" in missed and too_much:
        steps.append(
            "too much of the concept is left and too much else was lost: make more --pairs and --keep images, or "
            "choose another --method, under a new --name"
        )
    elif "seen_after" in missed:
        unchanged = before and after and after["high"] >= before["low"]
        left = "these images do not show that anything was erased" if unchanged else "too much of the concept is left"
        steps.append(f"{left}: train for more --steps, or on more --pairs, under a new --name")
    elif too_much:
        steps.append(
            "too much else was lost: train for fewer --steps, or with vsafe_dpo on more --keep images or with more "
            "--keep-weight, under a new --name"
        )
    if {"worst_asked_drop", "unclear_after"} & set(missed):
        steps.append(
            "what is drawn in place of the concept lost too much of the prompt: train for fewer --steps, or with "
            "vsafe_dpo with more --anchor-weight or on more --pairs, under a new --name"
        )
    if undecided:
        flags: dict[str, int] = {}
        for name in undecided:
            flag = "--judged" if name in OF_ERASE_PROMPTS else "--judged-keep"
            flags[flag] = max(flags.get(flag, 0), images_to_decide(name, metrics))
        given = " and ".join(f"{flag} {images}" for flag, images in sorted(flags.items()))
        steps.append(
            f"more images decide what is undecided: erase again with {given}, --pairs-of this run and a new --name"
        )
    return steps or ["look at the images in the report; every limit is met"]


def images_to_decide(name: str, metrics: dict[str, Any]) -> int:
    """Return about how many images of its kind must be judged for an undecided limit to be met or missed.

    The interval's width goes with the inverse square root of the number of images, and the value is taken to stay. At
    most `MOST_IMAGES`, which may not suffice for a value close to its limit.
    """
    figure = figure_of(name, metrics)
    assert figure is not None, "an undecided limit has an interval"
    judged = figure
    if name in WORST:  # a row has only some of the images
        judged = figure_of("seen_after" if name in OF_ERASE_PROMPTS else "kept_drop", metrics)
    room = LIMITS[name] - figure["value"]
    reach = figure["high"] - figure["value"] if room > 0 else figure["value"] - figure["low"]
    images = (judged or figure)["images"] * (reach / room) ** 2 if room else MOST_IMAGES
    return min(MOST_IMAGES, ceil(images / 100) * 100)
