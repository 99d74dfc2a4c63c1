"""The table of stages: consistent in itself, and what follows from it."""

from __future__ import annotations

from vce_ray.pipeline.stages import NAMES, STAGES, downstream, upstream


def names(specs) -> list[str]:
    return [spec.name for spec in specs]


def test_stages_read_only_earlier_ones() -> None:
    seen: set[str] = set()
    for spec in STAGES:
        assert set(spec.inputs) <= seen, spec.name
        seen.add(spec.name)
    assert len(seen) == len(STAGES) == len(NAMES)


def test_what_a_retry_invalidates_follows_from_the_inputs() -> None:
    assert names(downstream(["safe"])) == ["safe", "pairs", "reference", "training", "evaluation", "report"]
    assert names(downstream(["reference"])) == ["reference", "training", "evaluation", "report"]
    assert names(downstream(["captions", "reference"])) == list(NAMES[2:])
    assert names(upstream("safe")) == ["prompts", "unsafe", "captions"]
    paths = [path for spec in downstream(["unsafe"]) for path in spec.invalidated]
    assert len(set(paths)) == len(paths)
    assert "evaluation/before" not in paths, "images of the base depend on no pair"
