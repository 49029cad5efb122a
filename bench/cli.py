"""The command line: ``python -m bench``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bench import charts, machine, report
from bench.context import Context
from bench.model import RowResult
from bench.processes import BenchError, private_mounts

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "bench"
DOCUMENT = ROOT / "docs" / "performance.md"
_FULL_PAIRS, _QUICK_PAIRS = 5, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a program; the exit code says whether it could measure, not whether the figures are good."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "run")
    options = _parser().parse_args(words)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return int(options.func(options))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures Farshore beside its peers, in turns. Without a command: run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("run", help="measure (the default)")
    command.add_argument("--rows", metavar="1,2,6", help="only these rows of the table (default: all)")
    command.add_argument(
        "--pairs", type=_positive, metavar="N", help=f"runs of each (default: {_FULL_PAIRS}, quick {_QUICK_PAIRS})"
    )
    command.add_argument("--scale", type=_fraction, default=1.0, metavar="F", help="fraction of the sizes, to try out")
    command.add_argument("--quick", action="store_true", help="rows 1-7 unless --rows says otherwise, fewer runs")
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: build/bench")
    command.add_argument("--list", action="store_true", help="show the rows and end")
    command.set_defaults(func=_run)

    command = commands.add_parser("profile", help="where the time goes, for row 1 or 6")
    command.add_argument("row", type=int, choices=(1, 6))
    command.add_argument("--scale", type=_fraction, default=1.0, metavar="F", help="fraction of the size")
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: build/bench")
    command.set_defaults(func=_profile)

    command = commands.add_parser("docs", help="put the last results and charts into docs/performance.md")
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the results are")
    command.set_defaults(func=_docs)

    command = commands.add_parser("charts", help="draw the charts of the last results anew")
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the results are")
    command.set_defaults(func=_charts)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 4:
        raise argparse.ArgumentTypeError(f"{text}: more than 0, at most 4")
    return value


def _run(options: argparse.Namespace) -> int:
    from bench import rows

    families = rows.families()
    known = {number: text for family in families for number, text in family.rows.items()}
    if options.list:
        for number, text in sorted(known.items()):
            print(f"{number:>3}  {text}")
        return 0
    wanted = _wanted(options, known)
    context = _context(options)
    context.say(f"rows {', '.join(map(str, wanted))}; {context.pairs} pairs" + (", quick" if options.quick else ""))
    results: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "pairs": context.pairs,
        "scale": context.scale,
        "quick": context.quick,
        "load": machine.load(),
        "seconds": 0.0,
        "machine": machine.describe(),
        "rows": [],
    }
    if results["load"] > 0.5:
        context.say(f"the machine is busy (load {results['load']:.2f}); figures of a quiet one are worth more")
    code = 0
    for family in families:
        asked = [number for number in family.rows if number in wanted]
        if not asked:
            continue
        context.say("row " + " and ".join(f"{number}: {family.rows[number]}" for number in asked))
        try:
            found = family.run(context, asked)
        except (BenchError, OSError, RuntimeError, ValueError, LookupError) as error:
            code = 1
            if not isinstance(error, BenchError):
                traceback.print_exc()
            context.say(f"    FAILED: {error}")
            found = [RowResult(n, f"row {n}", family.rows[n], error=str(error) or repr(error)) for n in asked]
        results["rows"] += [row.as_json() for row in found]
        results["seconds"] = time.monotonic() - context.began
        # After each family: what is measured is not lost when something fails or somebody interrupts.
        _write(results, context.out)
        for row in found:
            context.say(f"  row {row.number}: {report.MARKS[row.verdict]}")
    print(f"\n{report.table(results['rows'])}\n\n{context.out / 'results.md'}", flush=True)
    return code


def _wanted(options: argparse.Namespace, known: dict[int, str]) -> list[int]:
    from bench.rows import QUICK

    if options.rows is None:
        return [number for number in sorted(known) if not options.quick or number in QUICK]
    try:
        asked = [int(word) for word in options.rows.split(",")]
    except ValueError:
        raise BenchError(f"--rows {options.rows}: numbers with commas between them") from None
    if unknown := [number for number in asked if number not in known]:
        raise BenchError(f"--rows {unknown[0]}: there are {', '.join(map(str, sorted(known)))}")
    return asked


def _context(options: argparse.Namespace) -> Context:
    out = options.out.absolute()
    logs = out / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    quick = getattr(options, "quick", False)
    pairs = getattr(options, "pairs", None) or (_QUICK_PAIRS if quick else _FULL_PAIRS)
    # Our own commands are run as modules from wherever.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    context = Context(pairs, options.scale, quick, out, logs)
    if os.geteuid() == 0:
        context.outer_mounts = private_mounts()
    return context


def _write(results: dict[str, Any], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "results.md").write_text(report.markdown(results), encoding="utf-8")
    charts.draw(results, out)


def _profile(options: argparse.Namespace) -> int:
    from bench import profile

    text = profile.run(_context(options), options.row)
    path = options.out / f"profile-{options.row}.md"
    path.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path}")
    return 0


def _read(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{error.filename}: {error.strerror}; run `make bench` first") from None
    return found


def _charts(options: argparse.Namespace) -> int:
    for path in charts.draw(_read(options.out), options.out):
        print(path)
    return 0


def _docs(options: argparse.Namespace) -> int:
    results = _read(options.out)
    images = DOCUMENT.parent / "images"
    images.mkdir(exist_ok=True)
    for old in images.glob("bench-*.svg"):
        old.unlink()
    shown = []
    for path in charts.draw(results, options.out):
        name = f"bench-{path.name}"
        shutil.copyfile(path, images / name)
        shown.append(name)
    generated = report.markdown(results, images={name.removeprefix("bench-"): f"images/{name}" for name in shown})
    for number in (1, 6):
        with contextlib.suppress(FileNotFoundError):
            generated += "\n" + (options.out / f"profile-{number}.md").read_text(encoding="utf-8")
    try:
        text = report.put_between(DOCUMENT.read_text(encoding="utf-8"), generated)
    except ValueError as error:
        raise BenchError(f"{DOCUMENT}: {error}") from None
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"{DOCUMENT}, {len(shown)} charts in {images}")
    return 0
