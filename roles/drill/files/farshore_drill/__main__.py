"""Write report.json and report.html from a drill's evidence: ``python3 -m farshore_drill DIRECTORY``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .page import render
from .report import build, summary


def main() -> int:
    """Exit code 0: the drill has passed; 1: it has not."""
    parser = argparse.ArgumentParser(prog="farshore_drill", description="Make the report of a disaster drill.")
    parser.add_argument("directory", type=Path, help="where the evidence is and the report is written")
    parser.add_argument("--failed-step", default="", help="a step that failed and is not on record")
    parser.add_argument("--reason", default="", help="why it failed")
    options = parser.parse_args()
    report = build(options.directory, options.failed_step, options.reason)
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.html", render(report))):
        path = options.directory / name
        path.with_suffix(".new").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".new"), path)
    print("\n".join(summary(report)))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
