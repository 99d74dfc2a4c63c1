"""Erases explicit content: violence from the embedded model, or nudity from a real one.

    ray job submit --working-dir . -- python jobs/erase_nsfw.py --store s3://bucket/runs
    ray job submit --working-dir . -- python jobs/erase_nsfw.py nudity --base deepseek-community/Janus-Pro-7B

Options are those of `vce-ray erase`. Exit code 0: done. 2: something to mend, told in one line. 1: a fault.
The same command goes on where a killed job stopped.
"""

from __future__ import annotations

import sys

from vce_ray.cli.app import main as command


def main(arguments: list[str]) -> int:
    """Runs `vce-ray erase` with these arguments; the concept is violence if none is named."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["violence", *arguments]
    return command(["erase", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
