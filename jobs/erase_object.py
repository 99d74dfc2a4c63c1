#!/usr/bin/env python
"""Erase an object, or any other concept of the catalogue, from a base model.

    ray job submit --working-dir . -- jobs/erase_object.py deer --store s3://bucket/runs
    jobs/erase_object.py deer --store runs                   # on this machine

Takes the options of `vce-ray erase`. Exit code 0: done. 2: bad input or environment, described in one line. 1: any
other error. The same command resumes a job that was killed.
"""

from __future__ import annotations

import sys

from vce_ray.cli.app import main as command


def main(arguments: list[str]) -> int:
    """Run `vce-ray erase` with these arguments; the default concept is deer."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["deer", *arguments]
    return command(["erase", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
