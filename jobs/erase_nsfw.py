#!/usr/bin/env python
"""Erase explicit content: nudity and violence from a released model, violence from the embedded one.

    ray job submit --working-dir . -- jobs/erase_nsfw.py --store s3://bucket/runs
    ray job submit --working-dir . -- jobs/erase_nsfw.py --base deepseek-community/Janus-Pro-7B --store s3://bucket/runs
    ray job submit --working-dir . -- jobs/erase_nsfw.py nudity --base deepseek-community/Janus-Pro-7B ...
    jobs/erase_nsfw.py --store runs                          # on this machine

With a --base and no concept it makes two runs, as `vce-ray fleet nudity violence`, and takes that command's options;
else one, with those of `vce-ray erase`. Nudity is judged by NudeNet (`pip install '.[nudenet]'`) and a CLIP.

Exit code 0: done. 2: bad input or environment, described in one line or on the summary page. 1: any other error. The
same command resumes a job that was killed.
"""

from __future__ import annotations

import argparse
import sys

from vce_ray.cli.app import main as command
from vce_ray.config import EMBEDDED


def main(arguments: list[str]) -> int:
    """Run `vce-ray erase` or `vce-ray fleet` with these arguments and, if they name no concept, the default ones."""
    if arguments and not arguments[0].startswith("-"):
        return command(["erase", *arguments])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--base", default=EMBEDDED)
    if parser.parse_known_args(arguments)[0].base == EMBEDDED:
        return command(["erase", "violence", *arguments])
    return command(["fleet", "nudity", "violence", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
