"""In a process of its own, on one core: the engine's kernels, beside others' (rows 4 and 5). Prints JSON lines."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench import inputs

Work = Callable[[], float]


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="bench.worker")
    parser.add_argument("what", choices=("kernels", "hostile"))
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    options = parser.parse_args()
    # Before anything is imported that might make threads: they inherit it.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from farshore import delta

    delta.warm_up()
    for line in _kernels(options) if options.what == "kernels" else _hostile(options):
        print(json.dumps(line), flush=True)
    return 0


def _kernels(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per run: contestant, pair, seconds."""
    old, new = inputs.unrelated(options.size)
    for name in (contestants := _contestants(old, new)):
        contestants[name]()
    for number in range(options.pairs):
        for name, contestant in contestants.items():
            cpu = time.process_time()
            seconds = contestant()
            yield {"name": name, "pair": number, "seconds": seconds, "cpu": time.process_time() - cpu}


def _contestants(old: bytes, new: bytes) -> dict[str, Work]:
    from blake3 import blake3

    from farshore import delta

    signature = delta.sign(io.BytesIO(old))
    same = delta.sign(io.BytesIO(new))
    target = bytearray(len(new))

    def memcpy() -> None:
        memoryview(target)[:] = new

    found: dict[str, Work] = {
        "signature kernel": _timed(lambda: _sign_in_place(new)),
        "scan kernel, no match": _timed(_scan_in_place(old, new)),
        "sign": _timed(lambda: delta.sign(io.BytesIO(new))),
        "scan, no match": _timed(lambda: _drain(signature, new)),
        "encode, nothing changed": _timed(lambda: _drain(same, new)),
        "blake3, one thread": _timed(lambda: blake3(new).digest()),
        "memcpy": _timed(memcpy),
    }
    try:
        # By name: it comes with bench/requirements.txt only, and the lint does not need it.
        xxhash: Any = importlib.import_module("xxhash")
    except ImportError:
        pass
    else:
        found["xxh3_128"] = _timed(lambda: xxhash.xxh3_128_digest(new))
    return found


def _sign_in_place(content: bytes) -> None:
    """The kernel of the signature alone: weak sums, strong hashes and digest, of content that lies in memory."""
    import numpy as np

    from farshore.delta import signature

    data = _WRITABLE.get(id(content))
    if data is None:
        data = _WRITABLE[id(content)] = np.frombuffer(content, np.uint8).copy()
    span = signature.window_span(signature.BLOCK_SIZE)
    signer = signature.BlockSigner(signature.BLOCK_SIZE, span)
    for start in range(0, len(data) - len(data) % span, span):
        signer.add(data, start, span)
    signer.digest()


#: Content as arrays that kernels take.
_WRITABLE: dict[int, Any] = {}


def _scan_in_place(old: bytes, new: bytes) -> Callable[[], object]:
    """The kernel of the rolling scan alone: which positions of ``new`` have a weak sum that a block of ``old`` has."""
    import numba
    import numpy as np

    from farshore import delta
    from farshore.delta import encode, kernels

    size = delta.BLOCK_SIZE
    base = delta.sign(io.BytesIO(old))
    index, _ = encode._make_index(base.weak[: base.length // size])
    scratch = kernels.make_scratch(size)
    data = np.frombuffer(new, np.uint8).copy()
    weak_sum, scan_batch, batch = kernels.weak_sum, kernels.scan_batch, kernels.SCAN_BATCH

    @numba.njit(nogil=True)
    def scan(data: Any, size: int, index: Any, scratch: Any) -> int:
        found = 0
        scratch.sums[0] = weak_sum(data, 0, size)
        position = 0
        while position + batch + size < len(data):
            found += scan_batch(data, position, batch, size, index, scratch)
            scratch.sums[0] = scratch.sums[batch]
            position += batch
        return found

    return lambda: scan(data, size, index, scratch)


def _hostile(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per run: input, pair, seconds of it, and seconds of random data right before it."""
    from farshore import delta

    random_old, random_new = inputs.unrelated(options.size)
    random_signature = delta.sign(io.BytesIO(random_old))
    _drain(random_signature, random_new)
    for name, make in inputs.HOSTILE.items():
        if name == "random":
            continue
        old, new = make(options.size)
        signature = delta.sign(io.BytesIO(old))
        for number in range(options.pairs):
            reference = _timed(lambda: _drain(random_signature, random_new))() / len(random_new)
            cpu = time.process_time()
            # Bound now: the timing ends before the next input is made.
            seconds = _timed(lambda signature=signature, new=new: _drain(signature, new))()  # type: ignore[misc]
            yield {
                "name": name,
                "pair": number,
                "seconds": seconds,
                "cpu": time.process_time() - cpu,
                "bytes": len(new),
                "random seconds": reference * len(new),
            }


def _drain(signature: Any, new: bytes) -> None:
    from farshore.delta import Encoder

    for _ in Encoder(signature, sign_new=False).encode(io.BytesIO(new)):
        pass


def _timed(work: Callable[[], object]) -> Work:
    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return once


if __name__ == "__main__":
    sys.exit(main())
