"""Flags: every setting has one, grouped in --help, and only those that are given become settings."""

from __future__ import annotations

from inspect import Signature
from typing import Any, get_args

import pytest
import typer

from vce_ray.cli.app import main
from vce_ray.cli.options import BOUNDS, POOLS, SECTIONS, TITLES, Flag, all_flags, to_settings
from vce_ray.config import ClusterConfig, Config
from vce_ray.errors import UserError
from vce_ray.run_config import RunConfig
from vce_ray.training.objectives import OBJECTIVES


def leaves(model: type[Config], path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Paths of all settings of a config model."""
    found: set[tuple[str, ...]] = set()
    for name, field in model.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation))
                 if isinstance(part, type) and issubclass(part, Config)]  # fmt: skip
        found |= leaves(inner[0], (*path, name)) if inner else {(*path, name)}
    return found


def test_every_setting_has_a_flag() -> None:
    settings = {path for path in leaves(RunConfig) if path[0] != "train"} - {("concept",)}  # the command's argument
    for objective in OBJECTIVES.values():
        settings |= leaves(objective.settings_type, ("train",))
    bounds = {("cluster", pool, bound) for pool in POOLS for bound in BOUNDS}
    assert bounds < settings
    flags = all_flags()
    assert {flag.path for flag in flags} == settings - bounds | {("cluster", pool, "actors") for pool in POOLS}
    assert len({flag.option for flag in flags}) == len(flags), "no flag means two settings"
    assert all(flag.help for flag in flags)
    assert set(SECTIONS) | {"run", "train"} == set(TITLES)


def test_help_groups_the_flags(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["erase", "--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f" {title} ─") for title in TITLES.values()]
    assert places == sorted(places)
    assert all(flag.option in text for flag in all_flags())


def test_only_flags_that_were_given_become_settings() -> None:
    given: dict[tuple[str, ...], Any] = {flag.path: None for flag in all_flags()}
    assert to_settings(given) == {}
    given |= {("seed",): 3, ("train", "steps"): 5, ("train", "shard"): False, ("pairs_of",): []}
    assert to_settings(given) == {"seed": 3, "train": {"steps": 5, "shard": False}}


def cluster(**values: Any) -> ClusterConfig:
    paths = {("cluster", *name.split("__")): value for name, value in values.items()}
    return ClusterConfig.model_validate(to_settings(paths).get("cluster", {}))


def test_flags_become_pools() -> None:
    made = cluster(
        draw__actors="2:16",
        draw__accelerator="H200",
        draw__gpus_per_actor=0.5,
        draw__labels=["zone=a"],
        caption__actors="3",
        caption__accelerator="L4",
        wait_s=60.0,
    )
    assert (made.draw.min_actors, made.draw.max_actors, made.draw.accelerator) == (2, 16, "H200")
    assert made.draw.labels == {"zone": "a"} and made.draw.gpus_per_actor == 0.5 and made.wait_s == 60
    assert made.caption is not None
    assert (made.caption.min_actors, made.caption.max_actors, made.caption.accelerator) == (3, 3, "L4")
    assert made.caption.labels == {"zone": "a"} and made.caption.gpus_per_actor == 0.5, "as those that draw"
    assert cluster() == ClusterConfig()
    for wrong in ("many", "2:", ":3", "-1"):
        with pytest.raises(UserError, match="give a number of actors"):
            cluster(draw__actors=wrong)
    with pytest.raises(UserError, match="label 'zone' is not key=value"):
        cluster(draw__labels=["zone"])


def test_brackets_in_a_help_text_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    flag = Flag(("base",), "run", "--base", str, "owner/name[@revision]")

    def command(**_: Any) -> None: ...

    command.__signature__ = Signature([flag.parameter()])  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {"base": flag.parameter().annotation}
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    with pytest.raises(SystemExit):
        app(["--help"])
    assert "owner/name[@revision]" in capsys.readouterr().out
