"""Row 3: one byte is inserted at the front of a large file, so that nothing is where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

from bench import data, limits, peers
from bench.context import OURS, Context, field_of_play, our_pair
from bench.model import RowResult, Sample
from bench.nodes import Pair, check_same
from bench.processes import need, run

SIZE = 1 << 30
RSYNC = "rsync --no-whole-file"
INPLACE = "rsync --inplace"


class Insertion:
    """What an editor or an export does: the file is written anew beside the old one, and takes its name."""

    rows: ClassVar[Mapping[int, str]] = {3: "one byte inserted at the front of 1 GiB: time, and bytes on the wire"}

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure; the new file is made beside the tree, and a rename starts the clock."""
        need("rsync", "ss")
        row = RowResult(3, "a byte inserted at the front", self.rows[3])
        size = context.size(SIZE)
        with field_of_play(context, 4 * size + (256 << 20), 6 * size + (512 << 20)) as field:
            new = field.source / "peers" / "file"
            new.parent.mkdir()
            data.random_file(new, size)
            (field.source / "ours").mkdir()
            run(["cp", "-p", "--reflink=never", str(new), str(field.source / "ours" / "file")])
            targets = {name: field.target / name.replace(" ", "_") for name in (RSYNC, INPLACE)}
            for target in targets.values():
                target.mkdir()
                run(["cp", "-p", "--reflink=never", str(new), str(target / "file")])
            context.say("    bringing the trees in step")
            with our_pair(context, field) as pair:

                def ours(number: int, pair: Pair = pair) -> Sample:
                    prepared = field.source / "prepared"
                    byte = bytes([number % 256])
                    data.insert_front(new, prepared, byte)
                    os.replace(prepared, new)
                    data.insert_front(pair.source / "file", prepared, byte)
                    return pair.measure(lambda: os.replace(prepared, pair.source / "file"))

                def theirs(name: str, *options: str) -> Sample:
                    words = ["-t", "--no-whole-file", *options]
                    return peers.rsync(str(new), str(targets[name] / "file"), words, field.target)

                row.runs = context.turns(
                    {OURS: ours, RSYNC: lambda _: theirs(RSYNC), INPLACE: lambda _: theirs(INPLACE, "--inplace")}
                )
                check_same(pair)
            row.limits += [
                limits.cached_read(new),
                limits.plain_copy(new, field.target),
                limits.fsync(field.target),
            ]
        row.compare(OURS, RSYNC, 0.7, 0.4)
        row.compare(OURS, RSYNC, 1.5, of="wire")
        row.compare(OURS, INPLACE, 0.7, 0.4, binding=False)
        row.notes.append(
            "rsync --inplace can't use blocks that it has overwritten already: with an insertion, it sends all."
        )
        return [row]
