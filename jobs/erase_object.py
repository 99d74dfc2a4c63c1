"""Erases one object (or any concept of the catalogue) from a base model.

    ray job submit --working-dir . -- python jobs/erase_object.py deer --store s3://bucket/runs
    python jobs/erase_object.py deer --store runs            # on this machine

Options are those of `vce-ray erase`. Exit code 0: done. 2: something to mend, told in one line. 1: a fault.
The same command goes on where a killed job stopped.
"""

from __future__ import annotations

import sys

from vce_ray.cli.app import main as command


def main(arguments: list[str]) -> int:
    """Runs `vce-ray erase` with these arguments; the concept is deer if none is named."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["deer", *arguments]
    return command(["erase", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
