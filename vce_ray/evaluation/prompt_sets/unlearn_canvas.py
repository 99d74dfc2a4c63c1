"""UnlearnCanvas (Zhang et al., 2024): every object in every style, with five seeds each. There is no file.

Categories are the style and the object, such as 'Van Gogh' or 'Dogs'. The names are those of the authors' code, which
evaluates 50 of the 60 styles; a model must have been trained on the set's images to know most of them.
"""

from collections.abc import Iterator

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt

STYLES = """
    Abstractionism, Artist Sketch, Blossom Season, Bricks, Byzantine, Cartoon, Cold Warm, Color Fantasy, Comic Etch,
    Crayon, Cubism, Dadaism, Dapple, Defoliation, Early Autumn, Expressionism, Fauvism, French, Glowing Sunset,
    Gorgeous Love, Greenfield, Impressionism, Ink Art, Joy, Liquid Dreams, Magic Cube, Meta Physics, Meteor Shower,
    Monet, Mosaic, Neon Lines, On Fire, Pastel, Pencil Drawing, Picasso, Pop Art, Red Blue Ink, Rust, Sketch,
    Sponge Dabbed, Structuralism, Superstring, Surrealism, Ukiyoe, Van Gogh, Vibrant Flow, Warm Love, Warm Smear,
    Watercolor, Winter
"""
OBJECTS = """
    Architectures, Bears, Birds, Butterfly, Cats, Dogs, Fishes, Flame, Flowers, Frogs, Horses, Human, Jellyfish,
    Rabbits, Sandwiches, Sea, Statues, Towers, Trees, Waterfalls
"""
SEEDS = (188, 288, 588, 688, 888)
UNLEARN_CANVAS = PromptSet(
    name="unlearn-canvas",
    title="UnlearnCanvas",
    source="nowhere as a file: give the name unlearn-canvas in place of a file",
    columns=(),
    sizes=(),
    prompts=lambda row: [],
)


def unlearn_canvas_prompts() -> Iterator[SetPrompt]:
    """Yield the prompts, 5,000 with their seeds."""
    for style in _names(STYLES):
        for thing in _names(OBJECTS):
            for seed in SEEDS:
                yield SetPrompt(f"A {thing} image in {style} style.", seed, categories=(style, thing))


def _names(text: str) -> list[str]:
    return [" ".join(name.split()) for name in text.split(",")]
