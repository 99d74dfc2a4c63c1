"""Reads the YAML files that users write, of concepts and fleets: small ones, in which each key is given once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vce_ray.errors import UserError, cut, quote

MAX_BYTES = 1 << 18
"""Size of the largest file that is read. A concept takes about 1 kB."""
MAX_EXPANDED = 1 << 20
"""Characters and values of the largest document, with each alias replaced by what it stands for. Nested aliases can
make gigabytes of a few lines."""


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file; None if it is empty.

    Raises:
        UserError: the file cannot be read, is not one YAML document in UTF-8, or is too large; or a mapping has a key
            twice. The message is one line.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES >> 10} kB, the limit for YAML files: split it")
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        root = loader.get_single_node()
        if root is None:
            return None
        if _expanded_size(root, {}) > MAX_EXPANDED:
            raise UserError(
                f"{path}: its aliases repeat values of more than {MAX_EXPANDED >> 10} kB in total: write out what is "
                "needed, without *aliases"
            )
        return loader.construct_document(root)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply: write lists and mappings of a few levels") from error
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark
        where = f"line {place.line + 1}, column {place.column + 1}: " if place else ""
        fix = ": indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{path} is not a YAML file: {where}{cut(str(error.problem))}{fix}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not a YAML file: {cut(str(error))}") from error
    except UserError:
        raise
    except ValueError as error:  # raised when a plain value looks like a date or number, but is none: 2024-13-01
        raise UserError(f"{path}: {cut(str(error))}: put quotes around the value") from error


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the characters and values of a node, with those of an alias counted each time it occurs.

    Args:
        sizes: size by id of each node seen; 0 of those that contain this one.

    Raises:
        MarkedYAMLError: an alias stands for a value that contains it, or a mapping has a key twice.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(problem="an alias in its own value", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    problem = f"the key {quote(key.value)} is given twice: remove one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                names.add(key.value)
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
    sizes[id(node)] = 1 + own + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]
