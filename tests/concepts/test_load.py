"""The catalogue that ships with the package, and a user's own concept files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.emoji_world import world
from vce_ray.concepts.load import catalogue, load_concept
from vce_ray.config import EMBEDDED

ALL = [(base, name) for base in (EMBEDDED, "deepseek-community/Janus-Pro-1B") for name in catalogue(base)]
OBJECT_WORDS = set(world.OBJECTS) | {word for thing in world.THINGS for word in thing.synonyms}


def as_world_template(template: str, kind: str) -> str:
    """Return one of our templates in the notation of tools/emoji_world/world.py, without articles."""
    noun, style = ("{object}", "{name}") if kind == "style" else ("{name}", "{style}")
    return template.replace(noun, "{o}").replace(style, "{s}").replace("{background}", "{b}")


WORLD_TEMPLATES = {
    template.replace("{a} {s}", "a {s}").replace("{a} {o}", "a {o}").replace("{a}", "a") for template in world.TEMPLATES
}


@pytest.mark.parametrize(("base", "name"), ALL)
def test_every_concept_in_the_catalogue_loads_and_is_complete(base: str, name: str):
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


@pytest.mark.parametrize("name", catalogue(EMBEDDED))
def test_emoji_world_concepts_use_only_what_the_model_was_trained_on(name: str):
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
    assert catalogue() == catalogue(EMBEDDED) == sorted(catalogue())
    assert {"deer", "openmoji", "violence"} <= set(catalogue())
    with pytest.raises(ValueError, match="unknown concept 'defaults'"):
        load_concept("defaults")  # what the concepts share is not one of them
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


def test_a_users_concept_is_one_short_file(tmp_path: Path):
    concept = load_concept(own(tmp_path, "kind: object\nnames: [owl]\nreplacement: animal\nkeep: [penguin, fox]\n"))
    assert (concept.name, concept.names, concept.keep) == ("mine", ("owl",), ("penguin", "fox"))
    assert concept.templates == load_concept("deer").templates
    real = load_concept(own(tmp_path, "kind: object\nnames: [zebra]\nkeep: [giraffe]\n"), "some/model")
    assert {"zebra", "giraffe", "horse"} <= set(real.labels)
    bare = load_concept(own(tmp_path, "kind: style\nnames: [Monet]\n"), "some/model")
    assert len(bare.keep) == 5 and bare.labels[-1] == "Monet"


def test_an_explicit_concept_of_an_open_base_is_detected_and_one_of_the_embedded_model_named(tmp_path: Path):
    for name in ("nudity", "violence"):
        concept = load_concept(name, "some/model")
        assert concept.content == name and concept.question and len(concept.seen_texts) == len(set(concept.seen_texts))
        assert not any(concept.mentions(text) for text in concept.unseen_texts), "what does not show it does not say it"
    short = own(tmp_path, "{kind: explicit, names: [orgy, cult], keep: [picnic]}")
    concept = load_concept(short, "some/model")
    assert concept.seen_texts == ("a photo of an orgy", "a photo of a cult") and "a landscape" in concept.unseen_texts
    mine = own(
        tmp_path, "{kind: explicit, names: [orgy], keep: [picnic], seen_texts: [bodies], unseen_texts: [a lake]}"
    )
    assert load_concept(mine, "some/model").unseen_texts == ("a lake",)
    assert load_concept("violence").seen_texts == () and load_concept("deer", "some/model").seen_texts == ()


def test_own_templates_and_slots_replace_the_shared_ones(tmp_path: Path):
    text = 'kind: object\nnames: [owl]\ntemplates: ["a {name} on {place}"]\nslots: {place: [red, green]}\nkeep: [fox]\n'
    concept = load_concept(own(tmp_path, text))
    assert concept.templates == ("a {name} on {place}",)
    assert concept.held_out_templates == ()
    assert concept.slots == {"place": ("red", "green")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: object\nnames: [owl]\ncolour: red\n", "unknown key 'colour'.*allowed are name, kind, names"),
        ("names: [owl]\n", "mine.yaml: kind is missing$"),
        ("kind: animal\nnames: [owl]\n", "kind: input should be 'object', 'style' or 'explicit', not 'animal'"),
        ("kind: object\n", "names"),
        ("kind: object\nnames: []\n", "names is empty"),
        ("kind: object\nnames: owl\n", "names must be a list, such as names: \\[first, second\\], not 'owl'"),
        ("kind: object\nnames: [1]\n", "names"),
        ("kind: object\nnames: ['']\n", "blank"),
        ("kind: object\nnames: [owl]\nsynonyms: [tawny owl, Tawny owl]\n", "'Tawny owl' twice"),
        ("kind: object\nnames: [owl]\nfilter_terms: ['owl*']\n", "'owl\\*' can never occur"),
        ("kind: object\nnames: [owl]\nfilter_terms: ['barn  owl']\n", "can never occur"),
        ("kind: object\nnames: [owl]\nfilter_terms: ['!']\n", "can never occur"),
        ("kind: object\nnames: [owl]\nfilter_terms: [the]\n", "occurs in nearly every caption"),
        ("kind: object\nnames: [owl]\nkeep: [fox, owl]\n", "keep contains 'owl'.*is a term of the concept"),
        ("kind: object\nnames: [owl]\nsynonyms: [fox]\nkeep: [fox]\n", "keep contains 'fox'.*is a term of the concept"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nkeep_prompts: [two owls]\n", "keep_prompts contains 'two owls'"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nreplacement: owl\n", "replacement 'owl' would itself be filtered"),
        (
            "kind: object\nnames: [owl]\nkeep: [fox]\nlabels: [owl]\n",
            "'fox', which is not one of the judge's labels: owl",
        ),
        ("kind: object\nnames: [zebra]\n", "names contains 'zebra', which is none of the objects .* knows: cat, dog, "),
        ("kind: object\nnames: [Owl]\n", "'Owl', which .* knows \\(did you mean owl"),
        ("kind: explicit\nnames: [whales]\n", "'whales', which .* knows \\(did you mean whale.*vce-ray concepts"),
        ("kind: style\nnames: [monet]\n", "'monet', which is none of the styles that the model knows"),
        ("kind: object\nnames: [owl]\nkeep: [zebra]\n", "keep contains 'zebra', which is none of"),
        (
            "kind: object\nnames: [deer, openmoji]\n",
            "names contains 'openmoji', which is one of the model's styles, but a "
            "concept of kind object is about objects: write a concept for each kind, and erase them",
        ),
        (
            "kind: style\nnames: [noto, deer]\n",
            "'deer', which is one of the model's objects, .* kind style is about styles",
        ),
        (
            "kind: object\nnames: [orca]\nkeep: [fox]\nlabels: [orca, fox]\n",
            "names: 'orca' contains words that the model does not know: 'orca'",
        ),
        (
            "kind: object\nnames: [owl]\nkeep: [koala, fox]\nlabels: [owl, fox, koala]\n",
            "keep: 1 of 2 contain .*: 'koala'",
        ),
        ("kind: object\nnames: [owl]\nreplacement: bird\n", "replacement: 'bird' contains words"),
        (
            "kind: object\nnames: [owl]\ntemplates: ['a photo of a {name}', 'a {name}', 'photo: {name}, 4k']\n",
            "templates: 2 of 3 contain words that the model does not know: 'photo', '4k'. It knows cat, ",
        ),
        (
            "kind: object\nnames: [owl]\ntemplates: ['a {name} {when}']\nslots: {when: [at dawn, in red]}\n",
            "slots.when: 1 of 2 contain words that the model does not know: 'at', 'dawn'",
        ),
        ("kind: object\nnames: [owl]\nkeep_prompts: [a plane, a jet]\n", "keep_prompts: 1 of 2 contain .*: 'jet'"),
        ("kind: object\nnames: [owl]\ntemplates: ['a {name} in {mood}']\n", "unknown slot {mood}"),
        ("kind: object\nnames: [owl]\ntemplates: ['a bird']\n", "has no {name}"),
        ("kind: object\nnames: [owl]\ntemplates: ['a {name']\n", "unpaired brace"),
        ("kind: object\nnames: [owl]\ntemplates: ['an owl or a {name}']\n", "contains the term 'owl'"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: {mood: [dark]}\n", "slot 'mood' is used by no template"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: {style: []}\n", "slot 'style' is empty"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: red\n", "slots must map"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nslots: {style: red}\n", "slots.style must be a list"),
        ("kind: object\nnames: [owl]\nname: My Owl\n", "name 'My Owl' must be"),
        (
            "kind: object\nnames: [owl]\nkeep: [fox]\ntrain: {lr: 3}\n",
            "train: unknown setting 'lr': known are method, steps",
        ),
        ("kind: object\nnames: [owl]\nkeep: [fox]\npairs: {n: 3}\n", "pairs: unknown setting 'n': known are num_pairs"),
        (
            "kind: object\nnames: [owl]\nkeep: [fox]\npairs: {num_keep: -1}\n",
            "pairs: num_keep: input should be greater than or equal to 0, not -1",
        ),
        ("kind: object\nnames: [owl]\nkeep: [fox]\ntrain: 3\n", "train: input should be a valid dictionary, not 3"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nseen_texts: [an owl]\n", "give both, or neither"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nlabel_template: a bird\n", "must contain {name} once"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\nlabel_template: 'a {name} {x}'\n", "must contain {name} once"),
        ("kind: object\nnames: [owl]\nkeep: [fox]\ncontent: gore\n", "content: input should be 'nudity' or"),
        ("- owl\n", "must hold 'key: value' lines"),
        ("names: [owl\n", "is not a YAML file"),
    ],
)
def test_invalid_concepts_are_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_concept(own(tmp_path, text))


def test_an_unknown_name_is_answered_with_close_matches_and_the_catalogue():
    with pytest.raises(
        ValueError, match=f"unknown concept 'dear'. Did you mean deer.* holds: {', '.join(catalogue())}; or"
    ):
        load_concept("dear")
    with pytest.raises(ValueError, match=r"'nudity' is for released models: give one with --base, .* emoji-world"):
        load_concept("nudity")
    with pytest.raises(ValueError, match=r"unknown concept 'Van Gogh'. Did you mean van_gogh"):
        load_concept("Van Gogh", "some/model")
    with pytest.raises(ValueError, match=r"cannot read /nowhere/mine.yaml: No such file"):
        load_concept("/nowhere/mine.yaml")


def test_the_readme_shows_a_valid_concept(tmp_path: Path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "whale.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    concept = load_concept(str(tmp_path / "whale.yaml"), EMBEDDED)
    assert concept.names == ("whale",)
    assert concept.mentions("an orca on a blue background") and not concept.mentions("a fish")
