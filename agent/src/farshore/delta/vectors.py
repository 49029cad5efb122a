"""Explicit vectors for the kernels, written as LLVM IR: BLAKE3 on eight lanes, and the weak sums.

A loop is not left to the auto-vectoriser where the speed of the engine hangs on it. LLVM splits
vectors that are wider than the processor's, so this runs everywhere; the widths are AVX2's. Each
function here is an intrinsic to be called from a kernel; arrays are taken by their data pointer,
whatever their type, and places in them are given in bytes. Nothing is checked: the caller answers
for every byte that is read and written. Little-endian, as all platforms are that numba supports.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

# Imported by name: only some of the versions we support carry type information.
_ir: Any = importlib.import_module("llvmlite.ir")
_types: Any = importlib.import_module("numba").types
_cgutils: Any = importlib.import_module("numba.core.cgutils")
_intrinsic: Any = importlib.import_module("numba.extending").intrinsic

# A value, a builder or a type of LLVM or numba.
Llvm = Any

# Of the BLAKE3 specification, https://github.com/BLAKE3-team/BLAKE3-specs (section 2).
IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
ROUNDS = 7
LANES = 8
_MIXES = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)

# Bytes that one step of `block_sums` takes, and positions that one step of `roll_sums` gives.
SUM_STEP = 32
ROLL_STEP = 16

_I8 = _ir.IntType(8)
_I16 = _ir.IntType(16)
_I32 = _ir.IntType(32)
_I64 = _ir.IntType(64)
_WORDS = _ir.VectorType(_I32, LANES)
_BYTES = _ir.VectorType(_I8, 4 * LANES)
_HALVES = _ir.VectorType(_I16, 16)
_PAIRS = _ir.VectorType(_I32, 16)


def _splat(vector: Llvm, value: int) -> Llvm:
    return _ir.Constant(vector, [_ir.Constant(vector.element, value)] * vector.count)


def _lanes(indices: Sequence[int]) -> Llvm:
    return _ir.Constant(_ir.VectorType(_I32, len(indices)), [_ir.Constant(_I32, i) for i in indices])


def _broadcast(builder: Llvm, vector: Llvm, value: Llvm) -> Llvm:
    """Return `value`, an integer at least as wide as a lane, in all lanes."""
    if value.type.width > vector.element.width:
        value = builder.trunc(value, vector.element)
    none = _ir.Constant(vector, _ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(none, value, _I32(0)), none, _lanes([0] * vector.count))


def _bytes_of(context: Llvm, builder: Llvm, kind: Llvm, array: Llvm) -> Llvm:
    return builder.bitcast(context.make_array(kind)(context, builder, array).data, _I8.as_pointer())


def _load(builder: Llvm, vector: Llvm, start: Llvm, offset: Llvm) -> Llvm:
    loaded = builder.load(builder.bitcast(builder.gep(start, [offset]), vector.as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder: Llvm, value: Llvm, start: Llvm, offset: Llvm) -> None:
    builder.store(value, builder.bitcast(builder.gep(start, [offset]), value.type.as_pointer())).align = 1


def _transpose(builder: Llvm, rows: Sequence[Llvm]) -> list[Llvm]:
    """Transpose 8 vectors of 8 words, by the three stages of unpacks that AVX2 has."""
    low, high = _lanes([0, 8, 1, 9, 4, 12, 5, 13]), _lanes([2, 10, 3, 11, 6, 14, 7, 15])
    low2, high2 = _lanes([0, 1, 8, 9, 4, 5, 12, 13]), _lanes([2, 3, 10, 11, 6, 7, 14, 15])
    left, right = _lanes([0, 1, 2, 3, 8, 9, 10, 11]), _lanes([4, 5, 6, 7, 12, 13, 14, 15])
    shuffle = builder.shuffle_vector
    twos = [shuffle(rows[i], rows[i + 1], mask) for i in (0, 2, 4, 6) for mask in (low, high)]
    fours = [
        shuffle(twos[half + part], twos[half + part + 2], mask)
        for half in (0, 4)
        for part in (0, 1)
        for mask in (low2, high2)
    ]
    return [shuffle(fours[i], fours[i + 4], mask) for mask in (left, right) for i in range(4)]


def _rotate_right(builder: Llvm, words: Llvm, bits: int) -> Llvm:
    if bits % 8:
        return builder.or_(builder.lshr(words, _splat(_WORDS, bits)), builder.shl(words, _splat(_WORDS, 32 - bits)))
    # One shuffle of bytes takes the place of two shifts and an or.
    step = bits // 8
    mask = _lanes([(i & ~3) | ((i + step) & 3) for i in range(_BYTES.count)])
    as_bytes = builder.bitcast(words, _BYTES)
    return builder.bitcast(builder.shuffle_vector(as_bytes, as_bytes, mask), _WORDS)


def _compress(builder: Llvm, state: list[Llvm], message: Sequence[Llvm]) -> list[Llvm]:
    """Return the 8 words of the chaining value, of all lanes; `state` is used up.

    The four mixes of a half round are independent, but written one behind the other: so fewer
    values live at once, and the processor reorders them well enough by itself.
    """
    add, xor = builder.add, builder.xor
    schedule = list(range(16))
    for _ in range(ROUNDS):
        for mix, (a, b, c, d) in enumerate(_MIXES):
            for word, turn_d, turn_b in ((schedule[2 * mix], 16, 12), (schedule[2 * mix + 1], 8, 7)):
                state[a] = add(add(state[a], message[word]), state[b])
                state[d] = _rotate_right(builder, xor(state[d], state[a]), turn_d)
                state[c] = add(state[c], state[d])
                state[b] = _rotate_right(builder, xor(state[b], state[c]), turn_b)
        schedule = [schedule[i] for i in PERMUTATION]
    return [xor(state[i], state[i + 8]) for i in range(8)]


def _load_message(builder: Llvm, rows: Sequence[Llvm], offset: Llvm) -> list[Llvm]:
    message: list[Llvm] = []
    for half in (0, 32):
        at = builder.add(offset, _I64(half))
        message += _transpose(builder, [_load(builder, _WORDS, row, at) for row in rows])
    return message


@_intrinsic  # type: ignore[untyped-decorator]
def hash_rows(
    typing: Llvm,
    data: Llvm,
    lanes: Llvm,
    blocks: Llvm,
    last_length: Llvm,
    flags: Llvm,
    first_flags: Llvm,
    last_flags: Llvm,
    out: Llvm,
) -> tuple[Llvm, Callable[..., Llvm]]:
    """Compress eight rows, chunks or parents of BLAKE3, side by side.

    Row i begins lanes[i] bytes behind the address `data`, has the counter lanes[8 + i] and
    `blocks` blocks of 64 bytes, of which the last counts as `last_length` long. `flags` go with
    every block, `first_flags` and `last_flags` with the first and the last in addition. The
    chaining values, 8 * 32 bytes, go to the address `out`, after all input has been read.
    """
    word = _types.int64
    signature = _types.void(word, lanes, word, word, word, word, word, word)

    def generate(context: Llvm, builder: Llvm, signature: Llvm, args: Sequence[Llvm]) -> Llvm:
        start = builder.inttoptr(args[0], _I8.as_pointer())
        table = builder.bitcast(_bytes_of(context, builder, signature.args[1], args[1]), _I64.as_pointer())
        blocks, last_length, flags, first_flags, last_flags = args[2:7]
        rows = []
        counter_low = counter_high = _ir.Constant(_WORDS, _ir.Undefined)
        for lane in range(LANES):
            rows.append(builder.gep(start, [builder.load(builder.gep(table, [_I64(lane)]))]))
            counter = builder.load(builder.gep(table, [_I64(LANES + lane)]))
            counter_low = builder.insert_element(counter_low, builder.trunc(counter, _I32), _I32(lane))
            high = builder.trunc(builder.lshr(counter, _I64(32)), _I32)
            counter_high = builder.insert_element(counter_high, high, _I32(lane))
        chaining = [_cgutils.alloca_once_value(builder, _splat(_WORDS, value)) for value in IV]
        last = builder.sub(blocks, _I64(1))
        with _cgutils.for_range(builder, blocks) as loop:
            message = _load_message(builder, rows, builder.mul(loop.index, _I64(64)))
            is_first = builder.icmp_signed("==", loop.index, _I64(0))
            is_last = builder.icmp_signed("==", loop.index, last)
            length = builder.select(is_last, last_length, _I64(64))
            flags_here = builder.or_(flags, builder.select(is_first, first_flags, _I64(0)))
            flags_here = builder.or_(flags_here, builder.select(is_last, last_flags, _I64(0)))
            state = [builder.load(place) for place in chaining]
            state += [_splat(_WORDS, value) for value in IV[:4]]
            state += [counter_low, counter_high]
            state += [_broadcast(builder, _WORDS, length), _broadcast(builder, _WORDS, flags_here)]
            for place, value in zip(chaining, _compress(builder, state, message), strict=True):
                builder.store(value, place)
        target = builder.inttoptr(args[7], _I8.as_pointer())
        for lane, row in enumerate(_transpose(builder, [builder.load(place) for place in chaining])):
            _store(builder, row, target, _I64(32 * lane))
        return context.get_dummy_value()

    return signature, generate


@_intrinsic  # type: ignore[untyped-decorator]
def block_sums(typing: Llvm, data: Llvm, start: Llvm, steps: Llvm) -> tuple[Llvm, Callable[..., Llvm]]:
    """Return a | b << 16 of the 32 * `steps` bytes from byte `start` of `data`.

    Lanes of 16 bits suffice, for the sums are modulo 2**16: one for each place in a step, even
    and odd bytes apart. Each lane sums its bytes, and sums those sums, which weighs them by step;
    what its place within the step adds to the weight is set right once, at the end.
    """
    signature = _types.uint32(data, _types.int64, _types.int64)

    def generate(context: Llvm, builder: Llvm, signature: Llvm, args: Sequence[Llvm]) -> Llvm:
        row = builder.gep(_bytes_of(context, builder, signature.args[0], args[0]), [args[1]])
        zero = _splat(_HALVES, 0)
        even, odd, even_sum, odd_sum = (_cgutils.alloca_once_value(builder, zero) for _ in range(4))
        with _cgutils.for_range(builder, args[2]) as loop:
            both = _load(builder, _HALVES, row, builder.mul(loop.index, _I64(SUM_STEP)))
            for plain, summed, part in (
                (even, even_sum, builder.and_(both, _splat(_HALVES, 255))),
                (odd, odd_sum, builder.lshr(both, _splat(_HALVES, 8))),
            ):
                total = builder.add(builder.load(plain), part)
                builder.store(total, plain)
                builder.store(builder.add(builder.load(summed), total), summed)
        weighed = zero
        for plain, summed, first in ((even, even_sum, 0), (odd, odd_sum, 1)):
            place = _ir.Constant(_HALVES, [_ir.Constant(_I16, 2 * i + first) for i in range(16)])
            steps = builder.mul(builder.load(summed), _splat(_HALVES, SUM_STEP))
            weighed = builder.add(weighed, builder.sub(steps, builder.mul(builder.load(plain), place)))
        total = builder.add(builder.load(even), builder.load(odd))
        a, b = (builder.zext(_sum_lanes(builder, vector), _I32) for vector in (total, weighed))
        return builder.or_(a, builder.shl(b, _I32(16)))

    return signature, generate


def _sum_lanes(builder: Llvm, vector: Llvm) -> Llvm:
    for half in (8, 4, 2, 1):
        moved = builder.shuffle_vector(vector, vector, _lanes([(i + half) % 16 for i in range(16)]))
        vector = builder.add(vector, moved)
    return builder.extract_element(vector, _I32(0))


def _prefix_sums(builder: Llvm, vector: Llvm) -> Llvm:
    """Return for each of 16 lanes the sum of the lanes up to it."""
    zero = _splat(_HALVES, 0)
    for step in (1, 2, 4):
        # Within halves of 8 lanes, where a shift is one instruction.
        mask = _lanes([16 + i - step if i % 8 >= step else 0 for i in range(16)])
        vector = builder.add(vector, builder.shuffle_vector(zero, vector, mask))
    return builder.add(vector, builder.shuffle_vector(zero, vector, _lanes([0] * 8 + [16 + 7] * 8)))


@_intrinsic  # type: ignore[untyped-decorator]
def roll_sums(
    typing: Llvm,
    data: Llvm,
    start: Llvm,
    steps: Llvm,
    block_size: Llvm,
    sum_at_start: Llvm,
    factor: Llvm,
    shift: Llvm,
    sums: Llvm,
    slots: Llvm,
) -> tuple[Llvm, Callable[..., Llvm]]:
    """Roll the window of `block_size` bytes from byte `start` of `data` over 16 * `steps` places.

    Writes s of the windows at start + 1, start + 2, ... to sums[1], sums[2], ..., and
    (s * `factor` modulo 2**32) >> `shift` to `slots` likewise; both uint32. `sum_at_start` is s
    of the window at `start`. Reads `block_size` + 16 * `steps` bytes.

    The rule a(k+1) = a(k) - X(k) + X(l+1), b(k+1) = b(k) - (l-k+1) X(k) + a(k+1) is a prefix sum
    for a, and one more over it for b. Only adding the last of 16 places to the next 16 is
    serial.
    """
    word = _types.int64
    signature = _types.void(data, word, word, word, _types.uint32, _types.uint32, word, sums, slots)

    def generate(context: Llvm, builder: Llvm, signature: Llvm, args: Sequence[Llvm]) -> Llvm:
        leaving = builder.gep(_bytes_of(context, builder, signature.args[0], args[0]), [args[1]])
        entering = builder.gep(leaving, [args[3]])
        narrow = _ir.VectorType(_I8, 16)
        size = _broadcast(builder, _HALVES, args[3])
        factor = _broadcast(builder, _PAIRS, args[5])
        shift = _broadcast(builder, _PAIRS, args[6])
        all_last = _lanes([15] * 16)
        interleave = _lanes([16 * (i % 2) + i // 2 for i in range(32)])
        a = _cgutils.alloca_once_value(builder, _broadcast(builder, _HALVES, args[4]))
        b = _cgutils.alloca_once_value(builder, _broadcast(builder, _HALVES, builder.lshr(args[4], _I32(16))))
        sums, slots = (_bytes_of(context, builder, signature.args[i], args[i]) for i in (7, 8))
        with _cgutils.for_range(builder, args[2]) as loop:
            at = builder.mul(loop.index, _I64(ROLL_STEP))
            out = builder.zext(_load(builder, narrow, leaving, at), _HALVES)
            new = builder.zext(_load(builder, narrow, entering, at), _HALVES)
            rise = _prefix_sums(builder, builder.sub(new, out))
            here = builder.add(builder.load(a), rise)
            rise_b = _prefix_sums(builder, builder.sub(here, builder.mul(out, size)))
            here_b = builder.add(builder.load(b), rise_b)
            for carried, change in ((a, rise), (b, rise_b)):
                last = builder.shuffle_vector(change, change, all_last)
                builder.store(builder.add(builder.load(carried), last), carried)
            found = builder.bitcast(builder.shuffle_vector(here, here_b, interleave), _PAIRS)
            to = builder.add(builder.mul(at, _I64(4)), _I64(4))
            _store(builder, found, sums, to)
            _store(builder, builder.lshr(builder.mul(found, factor), shift), slots, to)
        return context.get_dummy_value()

    return signature, generate
