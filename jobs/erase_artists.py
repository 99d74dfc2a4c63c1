"""Erases several artists' styles, each in a run of its own; one that fails does not stop the others.

    ray job submit --working-dir . -- python jobs/erase_artists.py openmoji noto --store s3://bucket/runs
    python jobs/erase_artists.py openmoji noto --store runs      # on this machine

What follows the names are options of `vce-ray erase`, for every run. Exit code 0: all done. 2 or 1: the worst
of the runs, each of which is named with its own code at the end.
"""

from __future__ import annotations

import sys

from vce_ray.cli import main as command


def main(arguments: list[str]) -> int:
    """Runs `vce-ray erase` for each name before the first option."""
    first = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    artists, options = arguments[:first], arguments[first:]
    if not artists:
        print("erase_artists: name at least one style, e.g. openmoji", file=sys.stderr)
        return 2
    codes = {artist: command(["erase", artist, *options]) for artist in artists}
    for artist, code in codes.items():
        print(f"{artist}: {'done' if code == 0 else f'failed with exit code {code}'}")
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
