"""Tables of figures: what a command prints at its end, and the table of several erasures in a README."""

from __future__ import annotations

from typing import Any

ROWS = (
    ("concept seen", "seen_before", "seen_after"),
    ("  in held-out wordings", "held_out_before", "held_out_after"),
    ("kept concepts right", "kept_before", "kept_after"),
    ("image-text score, kept", "score_before", "score_after"),
)


def before_after_table(figures: dict[str, Any]) -> str:
    """Lines of figures before and after, for a terminal. Figures that were not measured are left out."""
    lines = [f"{'':<26}{'before':>9}{'after':>9}"]
    for title, before, after in ROWS:
        if figures.get(before) is not None:
            show = "{:9.3f}" if "score" in before else "{:9.1%}"
            lines.append(f"{title:<26}{show.format(figures[before])}{show.format(figures[after])}")
    if figures.get("worst_neighbour"):
        drop = 100 * figures["worst_neighbour_drop"]
        lines.append(f"worst kept neighbour: {figures['worst_neighbour']}, {drop:+.1f} points lost")
    if figures.get("something_share") is not None:
        lines.append(f"images after that show something: {figures['something_share']:.1%}")
    return "\n".join(lines)


def results_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `evaluation_row` as a Markdown table; shares and drops in percent and points."""
    lines = [
        "| concept | method | images | seen before | seen after | worst neighbour | all kept | image-text score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ("worst_neighbour_drop", "kept_drop", "score_drop")
        neighbour, kept, score = (f"{round(-100 * row[name], 1) + 0.0:+.1f}" for name in names)  # no -0.0
        lines.append(
            f"| {row['concept']} | {row['method']} | {row['images']} | {row['seen_before']:.1%} | "
            f"{row['seen_after']:.1%} | {neighbour} | {kept} | {score} % |"
        )
    return "\n".join(lines)
