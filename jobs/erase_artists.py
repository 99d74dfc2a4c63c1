#!/usr/bin/env python
"""Erase several artists' styles in parallel, each in a run of its own. A run that fails does not affect the others.

    ray job submit --working-dir . -- jobs/erase_artists.py openmoji noto --store s3://bucket/runs
    ray job submit --working-dir . -- jobs/erase_artists.py artists.yaml --store s3://bucket/runs
    jobs/erase_artists.py openmoji noto --store runs             # on this machine

Takes the options of `vce-ray fleet`. Exit code 0: all runs are done. 2: bad input or environment, described in one line
or on the summary page. 1: any other error. The same command resumes a job that was killed, and retries failed runs.
"""

from __future__ import annotations

import sys

from vce_ray.cli.app import main as command


def main(arguments: list[str]) -> int:
    """Run `vce-ray fleet` with these arguments."""
    if not arguments or arguments[0].startswith("-"):
        print("erase_artists: name at least one style, e.g. openmoji, or a fleet file", file=sys.stderr)
        return 2
    return command(["fleet", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
