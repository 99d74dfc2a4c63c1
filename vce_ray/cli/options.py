"""Command line flags made from the config models, so that every setting has one.

A flag has the name of its field, or the field's `flag`, and the field's docstring as its help text. Only flags that are
given become settings; defaults are filled in later (pipeline/preflight.py), because many depend on the concept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from vce_ray.config import ClusterConfig, Config, EvalConfig, PairConfig, PoolConfig, SamplingConfig
from vce_ray.defaults import Settings
from vce_ray.errors import UserError
from vce_ray.run_config import RunConfig
from vce_ray.training.objectives import DEFAULT_METHOD, OBJECTIVES

SettingPath = tuple[str, ...]
"""Where a setting is in RunConfig, such as ('train', 'steps')."""
SECTIONS: dict[str, type[Config]] = {
    "sampling": SamplingConfig,
    "pairs": PairConfig,
    "evaluation": EvalConfig,
    "cluster": ClusterConfig,
}
TITLES = {
    "run": "Run",
    "sampling": "Sampling",
    "pairs": "Pair set",
    "train": "Training",
    "evaluation": "Evaluation",
    "cluster": "Cluster",
}
"""Groups of flags in --help, in order."""
POOLS = {"draw": "", "caption": "caption-"}
"""Prefix of the flags of each pool of actors."""
BOUNDS = ("min_actors", "max_actors")
"""Two fields of a pool that share one flag, --actors 2:16."""


@dataclass(frozen=True)
class Flag:
    """A flag and the setting it stands for."""

    path: SettingPath
    group: str
    option: str
    annotation: Any
    """Type that typer parses it as."""
    help: str
    switch: bool = False
    """Whether it is a switch without a --no- form: a setting that is off by default."""

    @property
    def variable(self) -> str:
        """Name of the command's parameter."""
        return "__".join(self.path)

    def parameter(self) -> Parameter:
        """Return the parameter that makes typer offer the flag. None means that it was not given."""
        names = [self.option]
        if self.annotation is bool and not self.switch:
            names = [f"{self.option}/--no-{self.option.removeprefix('--')}"]
        option = typer.Option(*names, help=escape(self.help), show_default=False, rich_help_panel=TITLES[self.group])
        annotation = Annotated[self.annotation | None, option]
        return Parameter(self.variable, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def all_flags() -> list[Flag]:
    """Return the flags of all settings of a run but its concept, in the order of --help."""
    flags = [
        _flag((name,), "run", field)
        for name, field in RunConfig.model_fields.items()
        if name not in (*SECTIONS, "train", "concept")
    ]
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            if name not in POOLS:
                flags.append(_flag((section, name), section, field))
        if section == "pairs":
            flags += _training_flags()
    return flags + list(_pool_flags())


def _training_flags() -> list[Flag]:
    """Return one flag for each setting of any method; those that only some methods have say which."""
    fields: dict[str, dict[str, FieldInfo]] = {}
    for method, objective in OBJECTIVES.items():
        for name, field in objective.settings_type.model_fields.items():
            fields.setdefault(name, {})[method] = field
    flags = []
    for name, by_method in fields.items():
        first = next(iter(by_method.values()))
        if name == "method":
            text = f"Training method. (default: {DEFAULT_METHOD})"
            flags.append(Flag(("train", "method"), "train", "--method", Literal[tuple(OBJECTIVES)], text))
            continue
        flags.append(_flag(("train", name), "train", first, _default_note(by_method)))
    return flags


def _default_note(by_method: dict[str, FieldInfo]) -> str:
    """Say what a training setting defaults to, and which methods have it, unless all agree."""
    defaults = {method: field.default for method, field in by_method.items()}
    if len(set(defaults.values())) > 1:
        return " (default: " + ", ".join(f"{value} for {method}" for method, value in defaults.items()) + ")"
    if len(by_method) < len(OBJECTIVES):
        return f" ({', '.join(by_method)} only, default: {next(iter(defaults.values()))})"
    return ""


def _pool_flags() -> Iterator[Flag]:
    for pool, prefix in POOLS.items():
        what = "draw and judge, and caption unless --caption-actors is given" if pool == "draw" else "only caption"
        text = f"Actors that {what}: a number, or bounds such as 2:16 between which Ray scales."
        yield Flag(("cluster", pool, "actors"), "cluster", f"--{prefix}actors", str, text)
        for name, field in PoolConfig.model_fields.items():
            if name not in BOUNDS:
                flag = _flag(("cluster", pool, name), "cluster", field)
                yield Flag(
                    flag.path,
                    flag.group,
                    f"--{prefix}{flag.option.removeprefix('--')}",
                    flag.annotation,
                    flag.help
                    if pool == "draw"
                    else f"Same as --{flag.option.removeprefix('--')}, for captioning actors.",
                )


def _flag(path: SettingPath, group: str, field: FieldInfo, note: str = "") -> Flag:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    option = str(extra.get("flag", f"--{path[-1].replace('_', '-')}"))
    text = " ".join((field.description or "").split())
    if not note and field.default not in (None, (), {}) and "Default:" not in text:
        note = f" (default: {field.default})"
    return Flag(path, group, option, _parsed_as(field.annotation), text + note, switch=field.default is False)


def _parsed_as(annotation: Any) -> Any:
    """Return the type that typer parses a field as: without None; lists and mappings as repeated strings."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = [part for part in get_args(annotation) if part is not type(None)]
    return list[str] if get_origin(annotation) in (tuple, dict) else annotation


def with_settings(*groups: str, exclude: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these groups besides its own parameters.

    The command is called with the settings as its first argument: keys of RunConfig, sections as dicts, and only those
    that were given.

    Args:
        exclude: top-level settings without a flag.
    """
    flags = [flag for flag in all_flags() if flag.group in groups and flag.path[0] not in exclude]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [option for option in signature(command, eval_str=True).parameters.values() if option.name != "settings"]

        @wraps(command)
        def wrapper(**values: Any) -> None:
            command(to_settings({flag.path: values.pop(flag.variable) for flag in flags}), **values)

        parameters = [*own, *(flag.parameter() for flag in flags)]
        wrapper.__signature__ = Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        wrapper.__annotations__ = {option.name: option.annotation for option in parameters}
        return wrapper

    return decorate


def to_settings(values: dict[SettingPath, Any]) -> Settings:
    """Nest the values of flags by their paths; None and empty lists were not given.

    Raises:
        UserError: bounds that are not numbers, or a label without '='.
    """
    settings: Settings = {}
    for path, value in values.items():
        if value is None or value == []:
            continue
        section = settings
        for key in path[:-1]:
            section = section.setdefault(key, {})
        if path[-1] == "actors":
            section |= _bounds(path[-2], value)
        else:
            section[path[-1]] = _labels(value) if path[-1] == "labels" else value
    cluster = settings.get("cluster", {})
    if "caption" in cluster:  # captioning actors inherit GPUs and labels unless they have their own
        shared = {key: value for key, value in cluster.get("draw", {}).items() if key in ("gpus_per_actor", "labels")}
        cluster["caption"] = shared | cluster["caption"]
    return settings


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise UserError(f"label {pair!r} is not key=value")
        labels[key] = value
    return labels


def _bounds(pool: str, value: str) -> dict[str, int]:
    low, colon, high = value.partition(":")
    if not low.isdigit() or (colon and not high.isdigit()):
        raise UserError(f"--{POOLS[pool]}actors {value!r}: give a number of actors, such as 8, or bounds, such as 2:16")
    return {"min_actors": int(low), "max_actors": int(high if colon else low)}
