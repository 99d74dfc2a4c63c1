#!/usr/bin/env python
"""Erase explicit content: violence from the embedded model, or nudity from a released one.

    ray job submit --working-dir . -- jobs/erase_nsfw.py --store s3://bucket/runs
    ray job submit --working-dir . -- jobs/erase_nsfw.py nudity --base deepseek-community/Janus-Pro-7B ...
    jobs/erase_nsfw.py --store runs                          # on this machine

Takes the options of `vce-ray erase`. Exit code 0: done. 2: bad input or environment, described in one line. 1: any
other error. The same command resumes a job that was killed.
"""

from __future__ import annotations

import sys

from vce_ray.cli.app import main as command


def main(arguments: list[str]) -> int:
    """Run `vce-ray erase` with these arguments; the default concept is violence."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["violence", *arguments]
    return command(["erase", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
