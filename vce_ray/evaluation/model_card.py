"""The model card of an adapter: README.md of its folder, in the format of model hubs, made from a run's report data.

Names and prompts are untrusted text, and a card is made to be published: text is escaped for Markdown, and paths,
buckets and endpoints of the run are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.task import Task
from vce_ray.evaluation.formats import interval, percent
from vce_ray.evaluation.images import pair_images
from vce_ray.evaluation.judge import judge_name
from vce_ray.evaluation.page import FILTERS
from vce_ray.evaluation.report import ReportData, headline
from vce_ray.evaluation.table import before_after_rows
from vce_ray.evaluation.verdict import limit_states
from vce_ray.models.adapter_location import CARD, MODEL_CARD, PEFT_CONFIG
from vce_ray.models.folder import published_name, source_of
from vce_ray.run_config import RunConfig

KINDS = {"object": "an object", "style": "a style", "explicit": "explicit content"}
SETTINGS = {
    "seed": True,
    "sampling": True,
    "pairs": True,
    "train": True,
    "evaluation": {"num_erase", "num_keep"},
}
"""Settings that a card shows. The others are paths and addresses, or affect no result."""
_REPOSITORY = re.compile(r"[\w.-]{1,96}")
"""A name that hubs accept as that of a model; they refuse a card that names another one."""
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>&|~#$!]")


def write_model_card(task: Task, data: ReportData) -> None:
    """Write the card of a run's adapter into its folder, replacing an earlier one.

    The folder's index does not list it: the adapter loads with and without the card, and after it was edited.
    """
    adapter = task.store.read_json(f"adapter/{CARD}")
    peft = task.store.read_json(f"adapter/{PEFT_CONFIG}") if adapter["lora"] else {}
    mapping = peft.get("auto_mapping") or {}
    card = model_card(data, task.config, adapter["base_revision"], mapping.get("base_model_class"))
    task.store.write_bytes(MODEL_CARD, card.encode())


def model_card(data: ReportData, config: RunConfig, base_revision: str, base_class: str | None) -> str:
    """Return the card as Markdown with YAML front matter.

    Args:
        base_revision: vce_ray's revision of the base.
        base_class: class of transformers with which peft loads the base, or None if the adapter is not for peft.
    """
    base, revision = published_name(config.base)
    shown = pair_images(data.evaluation, "erase")[0].before
    lora = config.train.weights == "lora"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template("model_card.md").render(
        front_matter=Markup(_front_matter(config, base_class)),
        base=base,
        base_class=base_class,
        code={
            "base": _literal(base),
            "base_ref": _literal(f"{base}@{revision}" if revision else base),
            "revision": Markup(f", revision={_literal(revision)}") if revision else "",
            "prompt": _literal(shown["prompt"]),
            "seed": shown["seed"],
            "sampling": Markup(_generate_arguments(config.sampling)),
            "settings": Markup(_yaml(_settings(config))),
        },
        concept=data.concept,
        headline=headline(data)[0],
        judges=_judges(data.metrics, config),
        kind=KINDS[data.concept.kind],
        limits=limit_states(data.metrics),
        lora=lora,
        method=config.train.method,
        metrics={"judges": ()} | data.metrics,
        note=_base_note(config.base),
        on_hub=source_of(config.base) == "hub",
        pairs=_pairs(config),
        revision=base_revision,
        rows=_rows(data.metrics),
        run_name=data.run["name"],
        steps=config.train.steps,
        versions=", ".join(f"{name} {version}" for name, version in data.run["versions"].items()),
    )


def _escaped(value: Any) -> Any:
    """Escape text for Markdown, on one line. Markup is code or was escaped before."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(value.split()))


def _literal(text: str) -> Markup:
    """Return text as a literal of Python. It has one line, so it cannot end a block of code."""
    return Markup(json.dumps(text, ensure_ascii=False))


def _settings(config: RunConfig) -> Row:
    """Return the settings that a card shows: of pairs of other runs, only whose they are."""
    shown = config.model_dump(mode="json", include=SETTINGS)
    if config.pairs_of:
        del shown["pairs"]
        shown["pairs_of"] = list(config.pairs_of)
    return shown


def _judges(metrics: Row, config: RunConfig) -> str:
    """Name the judges that answered; those of an evaluation by version 0.1, which recorded none, by the settings."""
    recorded = [judge["judge"] for judge in metrics.get("judges", ())]
    names = recorded or [judge_name(name) for name in config.evaluation.clips(config.base)]
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _pairs(config: RunConfig) -> str:
    """Say which pairs a training used."""
    if config.pairs_of:
        return f"the pairs of the runs {', '.join(config.pairs_of)}, which were made in this way,"
    return "these pairs" + (", made from prompts of the user's own," if config.prompts_file else "")


def _front_matter(config: RunConfig, base_class: str | None) -> str:
    base, _ = published_name(config.base)
    on_hub = source_of(config.base) == "hub"
    lora = config.train.weights == "lora"
    fields: dict[str, Any] = {"base_model": base} if on_hub or _REPOSITORY.fullmatch(base) else {}
    fields["base_model_relation"] = "adapter" if lora else "finetune"
    fields["library_name"] = "peft" if base_class else "vce_ray"
    if config.base == EMBEDDED:
        fields["license"] = "apache-2.0"
    else:
        fields |= {"license": "other", "license_name": "that-of-the-base-model"}
        fields |= {"license_link": f"https://huggingface.co/{base}"} if on_hub else {}
    fields["pipeline_tag"] = "text-to-image"
    fields["tags"] = [*(["lora"] if lora else []), "vce_ray", "concept-erasure"]
    return _yaml(fields)


def _yaml(fields: dict[str, Any]) -> str:
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()


def _rows(metrics: Row) -> list[tuple[str, str, str]]:
    """Return title, figure before and figure after of each main metric that was measured."""

    def shown(name: str) -> str:
        figure = metrics["figures"][name]
        if "score" in name:
            return f"{figure['value']:.3f} ({interval(figure, scale=1, digits=3)})"
        return f"{percent(figure['value'])} ({interval(figure)})"

    return [(title.strip(), shown(before), shown(after)) for title, before, after in before_after_rows(metrics)]


def _generate_arguments(sampling: SamplingConfig) -> str:
    """Return these sampling settings as arguments of transformers' `generate`."""
    settings = f"guidance_scale={sampling.guidance_scale:g}"
    if sampling.temperature == 0:
        return f"do_sample=False, {settings}"
    chosen = f"do_sample=True, temperature={sampling.temperature:g}, top_k={sampling.top_k or 0}"
    return f"{chosen}, {f'top_p={sampling.top_p:g}, ' if sampling.top_p else ''}{settings}"


def _base_note(base: str) -> Markup | str:
    """Say where a base that is not on the hub comes from."""
    name, _ = published_name(base)
    if base == EMBEDDED:
        return Markup(
            "The base ships with vce_ray. This prints its folder, to be given as `base`:\n\n```\n"
            f"python -c \"from vce_ray.models.folder import model_folder; print(model_folder('{name}'))\"\n```"
        )
    if source_of(base) != "hub":
        return f"{name} is not the id of a model on the hub: give the folder of its checkpoint as base."
    return ""
