"""Concepts: the catalogue that ships, what a user may write, and how words are found in captions."""

from __future__ import annotations

import string
from pathlib import Path

import pytest

from tools.emoji_world import world
from vce_ray.concepts.concept import Concept, catalogue, fix_articles, load_concept, plural
from vce_ray.dataflow.ids import stable_id

ALL = [(base, name) for base in ("emoji_world", "deepseek-community/Janus-Pro-1B") for name in catalogue(base)]
OBJECT_WORDS = set(world.OBJECTS) | {word for thing in world.THINGS for word in thing.synonyms}


def as_world_template(template: str, kind: str) -> str:
    """One of our templates in the notation of tools/emoji_world/world.py, without articles."""
    noun, style = ("{object}", "{name}") if kind == "style" else ("{name}", "{style}")
    return template.replace(noun, "{o}").replace(style, "{s}").replace("{background}", "{b}")


WORLD_TEMPLATES = {
    template.replace("{a} {s}", "a {s}").replace("{a} {o}", "a {o}").replace("{a}", "a") for template in world.TEMPLATES
}


@pytest.mark.parametrize(("base", "name"), ALL)
def test_every_concept_of_the_catalogue_loads_and_is_complete(base: str, name: str):
    concept = load_concept(name, base)
    assert concept.name == name
    assert concept.terms() == tuple(sorted(concept.terms(), key=lambda term: (-len(term), term)))
    assert len(concept.keep) >= 4
    assert concept.held_out_templates
    assert concept.keep_prompts
    assert set(concept.names) | set(concept.keep) <= set(concept.labels)
    for text in (*concept.keep, *concept.keep_prompts, concept.replacement):
        assert concept.mentions(text) == ()
    for term in concept.terms():
        assert concept.mentions(f"this is {term.upper()}, it seems") == (term,)


@pytest.mark.parametrize("name", catalogue("emoji_world"))
def test_emoji_world_concepts_speak_only_what_the_model_was_taught(name: str):
    concept = load_concept(name)
    forms = [as_world_template(template, concept.kind) for template in concept.templates + concept.held_out_templates]
    assert set(forms) <= WORLD_TEMPLATES
    if concept.kind == "style":
        assert set(concept.names + concept.keep) == set(world.STYLES) == set(concept.labels)
        assert set(concept.slots["object"]) == {thing.name for thing in world.THINGS if thing.kind in world.KINDS}
    else:
        assert set(forms) == WORLD_TEMPLATES
        assert set(concept.labels) == set(world.OBJECTS)
        assert set(concept.names + concept.keep) <= set(world.OBJECTS)
        assert set(concept.synonyms) <= OBJECT_WORDS
        assert concept.slots["style"] == world.STYLES
        assert concept.replacement in world.KINDS
        kinds = {thing.kind for thing in world.THINGS if thing.name in concept.keep}
        assert kinds <= set(world.KINDS)
    assert concept.slots["background"] == tuple(world.BACKGROUNDS)
    assert abs(len(concept.templates) - len(concept.held_out_templates)) <= 1


def test_catalogues():
    emoji = ["cat", "church", "deer", "fluent", "lineart", "noto", "openmoji", "silhouette", "twemoji", "violence"]
    assert catalogue() == catalogue("emoji-world") == emoji
    real = set(catalogue("some/model"))
    assert {"nudity", "violence", "van_gogh", "picasso", "rembrandt", "warhol", "caravaggio"} <= real
    cifar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert set(cifar) <= real
    assert set(load_concept("deer", "some/model").labels) == set(cifar)
    assert load_concept("violence").names == ("pistol", "bomb", "knife", "dagger", "axe", "skull")
    assert load_concept("picasso", "some/model").keep == (
        "Vincent van Gogh", "Rembrandt", "Andy Warhol", "Caravaggio",
    )  # fmt: skip


def own(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_users_own_concept_is_one_short_file(tmp_path: Path):
    concept = load_concept(own(tmp_path, "kind: object\nnames: [owl]\nreplacement: animal\nkeep: [penguin, fox]\n"))
    assert (concept.name, concept.names, concept.keep) == ("mine", ("owl",), ("penguin", "fox"))
    assert concept.templates == load_concept("deer").templates
    real = load_concept(own(tmp_path, "kind: object\nnames: [zebra]\nkeep: [giraffe]\n"), "some/model")
    assert {"zebra", "giraffe", "horse"} <= set(real.labels)
    bare = load_concept(own(tmp_path, "kind: style\nnames: [Monet]\n"), "some/model")
    assert len(bare.keep) == 5 and bare.labels[-1] == "Monet"


def test_own_templates_and_slots_replace_the_shared_ones(tmp_path: Path):
    text = 'kind: object\nnames: [owl]\ntemplates: ["a {name} by {time}"]\nslots: {time: [day, night]}\nkeep: [fox]\n'
    concept = load_concept(own(tmp_path, text))
    assert concept.templates == ("a {name} by {time}",)
    assert concept.held_out_templates == ()
    assert concept.slots == {"time": ("day", "night")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: object\nnames: [owl]\ncolour: red\n", "unknown key 'colour'.*allowed are name, kind, names"),
        ("names: [owl]\n", "kind"),
        ("kind: animal\nnames: [owl]\n", "kind: Input should be 'object', 'style' or 'explicit'"),
        ("kind: object\n", "names"),
        ("kind: object\nnames: []\n", "names is empty"),
        ("kind: object\nnames: owl\n", "names must be a list, such as names: \\[first, second\\], not 'owl'"),
        ("kind: object\nnames: [1]\n", "names"),
        ("kind: object\nnames: ['']\n", "blank"),
        ("kind: object\nnames: [owl, Owl]\n", "'Owl' twice"),
        ("kind: object\nnames: [owl]\nfilter_terms: ['owl*']\n", "'owl\\*' can never occur"),
        ("kind: object\nnames: [owl]\nfilter_terms: ['barn  owl']\n", "can never occur"),
        ("kind: object\nnames: [owl]\nfilter_terms: ['!']\n", "can never occur"),
        ("kind: object\nnames: [owl]\nfilter_terms: [the]\n", "stands in nearly every caption"),
        ("kind: object\nnames: [owl]\nkeep: [fox, owl]\n", "keep holds 'owl'.*cannot be both"),
        ("kind: object\nnames: [owl]\nsynonyms: [fox]\nkeep: [fox]\n", "keep holds 'fox'.*cannot be both"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nkeep_prompts: [two owls]\n", "keep_prompts holds 'two owls'"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nreplacement: owl\n", "replacement 'owl' is itself filtered"),
        ("kind: object\nnames: [zebra]\nkeep: [fox]\n", "'zebra', which the judge does not know; it knows: cat"),
        ("kind: object\nnames: [owl]\nkeep: [zebra]\n", "keep holds 'zebra', which the judge does not know"),
        ("kind: object\nnames: [owl]\ntemplates: ['a {name} in {mood}']\n", "unknown slot {mood}"),
        ("kind: object\nnames: [owl]\ntemplates: ['a bird']\n", "has no {name}"),
        ("kind: object\nnames: [owl]\ntemplates: ['a {name']\n", "unpaired brace"),
        ("kind: object\nnames: [owl]\ntemplates: ['an owl or a {name}']\n", "says 'owl' by itself"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: {mood: [dark]}\n", "slot 'mood' is used by no template"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: {style: []}\n", "slot 'style' is empty"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: red\n", "slots must map"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: {style: red}\n", "slots.style must be a list"),
        ("kind: object\nnames: [owl]\nname: My Owl\n", "name 'My Owl' must be"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\ntrain: {betta: 1}\n", "train: betta: Extra inputs"),
        (
            "kind: object\nnames: [owl]\nkeep: [fox]\npairs: {num_keep: -1}\n",
            "pairs: num_keep: Input should be greater",
        ),
        ("kind: object\nnames: [owl]\nkeep: [fox]\ntrain: 3\n", "train: Input should be a valid dict"),
        ("- owl\n", "must hold 'key: value' lines"),
        ("names: [owl\n", "is not a YAML file"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_concept(own(tmp_path, text))


def test_an_unknown_concept_gets_close_matches_and_the_catalogue():
    with pytest.raises(ValueError, match=r"unknown concept 'dear'. Did you mean deer.* holds: cat, church, deer"):
        load_concept("dear")
    with pytest.raises(ValueError, match=r"unknown concept 'Van Gogh'. Did you mean van_gogh"):
        load_concept("Van Gogh", "some/model")
    with pytest.raises(ValueError, match=r"cannot read the concept file /nowhere/mine.yaml: No such file"):
        load_concept("/nowhere/mine.yaml")


def test_a_template_cannot_be_in_both_lists():
    with pytest.raises(ValueError, match="both in templates and in held_out_templates"):
        Concept(name="x", kind="object", names=("owl",), templates=("a {name}",), held_out_templates=("a {name}",))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a deer", ("deer",)),
        ("DEER, stags and Does", ("deer", "stag", "doe")),
        ("the deer's antlers", ("deer", "antler")),
        ("the stag\u2019s head, a deer-like thing", ("stag", "deer")),
        ("a dear reindeer-free hearth", ("reindeer",)),
        ("a hart_emoji", ("hart",)),
        ("deerskin, staggering, doer, 4deer", ()),
        ("", ()),
    ],
)
def test_mentions_finds_whole_words(text: str, found: tuple[str, ...]):
    assert load_concept("deer").mentions(text) == found


def test_mentions_takes_the_longest_term_and_any_gap():
    concept = load_concept("van_gogh", "some/model")
    assert concept.mentions("by Vincent van Gogh") == ("Vincent van Gogh",)
    assert concept.mentions("VAN-GOGH and van  gogh") == ("Van Gogh",)
    assert concept.mentions("a van and a starry sky") == ()
    knife = load_concept("violence")
    assert knife.mentions("two knives, axes, bloody") == ("knife", "axe", "bloody")


@pytest.mark.parametrize(
    ("one", "many"),
    [("knife", "knives"), ("church", "churches"), ("deer", "deer"), ("lady", "ladies"), ("key", "keys"),
     ("young woman", "young women"), ("axe", "axes"), ("wolf", "wolves"), ("bus", "buses"), ("thing", "things")],
)  # fmt: skip
def test_plural(one: str, many: str):
    assert plural(one) == many


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("a owl and an cat", "an owl and a cat"),
        ("a openmoji emoji of an umbrella", "an openmoji emoji of an umbrella"),
        ("an unicorn, a hour, an university, a honest man", "a unicorn, an hour, a university, an honest man"),
        ("A animal. An dog.", "An animal. A dog."),
        ("an one-eyed man", "a one-eyed man"),
        ("plan A is set, vitamin A in milk", "plan A is set, vitamin A in milk"),
        ("an SUV and a UFO and an 8-bit icon", "an SUV and a UFO and an 8-bit icon"),
        ('a "octopus" (an big one)', 'an "octopus" (a big one)'),
        ("it's a-ok, banana, à la carte", "it's a-ok, banana, à la carte"),
        ("", ""),
    ],
)
def test_fix_articles(text: str, fixed: str):
    assert fix_articles(text) == fixed
    assert fix_articles(fixed) == fixed


def test_fix_articles_agrees_with_the_emoji_world():
    for word in (*OBJECT_WORDS, *world.STYLES, *world.KINDS):
        assert fix_articles(f"a {word}") == fix_articles(f"an {word}") == f"{world.article(word)} {word}"


def test_stable_id():
    assert stable_id("deer", 1, {"b": 2, "a": [True, None]}) == stable_id("deer", 1, {"a": [True, None], "b": 2})
    ids = {stable_id(1), stable_id("1"), stable_id(1.0), stable_id([1]), stable_id(), stable_id(1, 1), stable_id("é")}
    assert len(ids) == 7
    assert all(len(value) == 16 and set(value) <= set(string.hexdigits.lower()) for value in ids)
    assert stable_id("deer", 3) == "01c79c74679c2143"
    with pytest.raises(ValueError, match="JSON values only"):
        stable_id(object())
    with pytest.raises(ValueError, match="JSON values only"):
        stable_id(float("nan"))


def test_the_concept_in_the_readme_is_a_concept(tmp_path: Path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "whale.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    concept = load_concept(str(tmp_path / "whale.yaml"), "emoji_world")
    assert concept.names == ("whale",)
    assert concept.mentions("an orca on a blue background") and not concept.mentions("a fish")
