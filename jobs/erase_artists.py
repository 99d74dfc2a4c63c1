"""Erases several artists' styles in parallel, each in a run of its own; one that fails does so alone.

    ray job submit --working-dir . -- python jobs/erase_artists.py openmoji noto --store s3://bucket/runs
    ray job submit --working-dir . -- python jobs/erase_artists.py artists.yaml --store s3://bucket/runs
    python jobs/erase_artists.py openmoji noto --store runs      # on this machine

What follows the names is as for `vce-ray fleet`. Exit code 0: all done. 2: something to mend, told in one line or on
the summary page. 1: a fault. The same command goes on where a killed job stopped, and tries again what failed.
"""

from __future__ import annotations

import sys

from vce_ray.cli.app import main as command


def main(arguments: list[str]) -> int:
    """Runs `vce-ray fleet` with these arguments."""
    if not arguments or arguments[0].startswith("-"):
        print("erase_artists: name at least one style, e.g. openmoji, or a fleet file", file=sys.stderr)
        return 2
    return command(["fleet", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
