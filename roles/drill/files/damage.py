#!/usr/bin/env python3
"""What a disaster does to a disk: some files are gone, some hold rubbish.

Runs once, before anything else looks at the files, on a host that is booted for the first time after a drill's failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
from pathlib import Path


def main() -> None:
    """Damage the files below the given directories, and say how many."""
    parser = argparse.ArgumentParser(description="Delete and garble files of a drill.")
    parser.add_argument("directory", type=Path, nargs="+")
    parser.add_argument("--delete", type=int, default=150, help="how many files are deleted")
    parser.add_argument("--garble", type=int, default=80, help="how many are overwritten in part")
    parser.add_argument("--flag", type=Path, required=True, help="file that allows it, and is removed first")
    parser.add_argument("--report", type=Path, required=True, help="file for the numbers")
    options = parser.parse_args()
    options.flag.unlink()
    files = []
    for directory in options.directory:
        for where, _, names in os.walk(os.fsencode(directory)):
            files += [os.path.join(where, name) for name in names]
    files = [path for path in files if os.path.isfile(path) and not os.path.islink(path)]
    chance = random.Random(len(files))
    chance.shuffle(files)
    deleted, garbled = files[: options.delete], files[options.delete : options.delete + options.garble]
    for path in deleted:
        os.unlink(path)
    for path in garbled:
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            file.seek(chance.randrange(max(1, os.path.getsize(path))))
            file.write(os.urandom(chance.randrange(1, 5000)))
    options.report.write_text(json.dumps({"deleted": len(deleted), "garbled": len(garbled)}), encoding="ascii")


if __name__ == "__main__":
    main()
