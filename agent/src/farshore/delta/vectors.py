"""Explicit vectors for the kernels, written as LLVM IR: BLAKE3 on 8 or 16 lanes, and the weak sums.

A loop is not left to the auto-vectoriser where the speed of the engine hangs on it. LLVM splits
vectors that are wider than the processor's, so this runs everywhere; the widths are AVX-512's where
the processor has it, else AVX2's. Each function here is an intrinsic to be called from a kernel;
arrays are taken by their data pointer, whatever their type, and places in them are given in bytes.
Nothing is checked: the caller answers for every byte that is read and written. Little-endian, as all
platforms are that numba supports.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

# Imported by name: only some of the versions we support carry type information.
_ir: Any = importlib.import_module("llvmlite.ir")
_types: Any = importlib.import_module("numba").types
_cgutils: Any = importlib.import_module("numba.core.cgutils")
_cpu_target: Any = importlib.import_module("numba.core.registry").cpu_target
_intrinsic: Any = importlib.import_module("numba.extending").intrinsic

# A value, a builder or a type of LLVM or numba.
Llvm = Any

# Of the BLAKE3 specification, https://github.com/BLAKE3-team/BLAKE3-specs (section 2).
IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
ROUNDS = 7
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


def lanes_for(features: str) -> int:
    """Return how many rows are best hashed at a time by a processor with these features, as LLVM writes them:
    ``+avx2,-avx512f``. 16 is what 32 registers of 512 bits hold."""
    return 16 if {"+avx512f", "+avx512bw", "+avx512vl"} <= set(features.split(",")) else 8


# What numba compiles for, and not what the processor is: the same words are part of the key of numba's cache. So
# machines that share its directory never get each other's width, nor do two settings of NUMBA_CPU_FEATURES.
LANES = lanes_for(_cpu_target.target_context.codegen().magic_tuple()[2])

# Bytes that one step of `block_sums` takes, and positions that one step of `roll_sums` gives.
SUM_STEP = 4 * LANES
ROLL_STEP = 16

_I8 = _ir.IntType(8)
_I16 = _ir.IntType(16)
_I32 = _ir.IntType(32)
_I64 = _ir.IntType(64)
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


def _part(builder: Llvm, vector: Llvm, first: int, count: int) -> Llvm:
    return builder.shuffle_vector(vector, vector, _lanes(range(first, first + count)))


def _transpose(builder: Llvm, rows: Sequence[Llvm]) -> list[Llvm]:
    """Transpose 8 vectors of 8 words, or 16 of 16, by the three or four stages of unpacks that AVX has."""
    count = len(rows)
    shuffle = builder.shuffle_vector

    def quarters(*places: int) -> Llvm:
        """In each 128 bits those of both vectors' words there; 4 to 7 are the second's."""
        return _lanes([at + place % 4 + count * (place // 4) for at in range(0, count, 4) for place in places])

    low, high = quarters(0, 4, 1, 5), quarters(2, 6, 3, 7)
    low2, high2 = quarters(0, 1, 4, 5), quarters(2, 3, 6, 7)
    even, odd = (
        _lanes([at + i for side in (0, count) for at in range(side + start, side + count, 8) for i in range(4)])
        for start in (0, 4)
    )
    twos = [shuffle(rows[i], rows[i + 1], mask) for i in range(0, count, 2) for mask in (low, high)]
    # Of each four rows: in the 128 bits number q of vector c are their words 4 q + c.
    parts = [
        [shuffle(twos[i + part], twos[i + part + 2], mask) for part in (0, 1) for mask in (low2, high2)]
        for i in range(0, count, 4)
    ]
    while len(parts) > 1:
        parts = [
            [shuffle(*pair, mask) for mask in (even, odd) for pair in zip(parts[i], parts[i + 1], strict=True)]
            for i in range(0, len(parts), 2)
        ]
    return parts[0]


def _rotate_right(builder: Llvm, words: Llvm, bits: int) -> Llvm:
    kind = words.type
    if bits % 8 or kind.count == 16:
        # AVX-512 has an instruction for this, which LLVM recognises.
        return builder.or_(builder.lshr(words, _splat(kind, bits)), builder.shl(words, _splat(kind, 32 - bits)))
    # One shuffle of bytes takes the place of two shifts and an or.
    step = bits // 8
    as_bytes = builder.bitcast(words, _ir.VectorType(_I8, 4 * kind.count))
    mask = _lanes([(i & ~3) | ((i + step) & 3) for i in range(as_bytes.type.count)])
    return builder.bitcast(builder.shuffle_vector(as_bytes, as_bytes, mask), kind)


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


def _load_message(builder: Llvm, words: Llvm, rows: Sequence[Llvm], offset: Llvm) -> list[Llvm]:
    message: list[Llvm] = []
    for part in range(0, 64, 4 * words.count):
        at = builder.add(offset, _I64(part))
        message += _transpose(builder, [_load(builder, words, row, at) for row in rows])
    return message


def hash_rows_by(lanes: int) -> Llvm:
    """Return the function `hash_rows` for 8 or 16 lanes."""

    def hash_rows(
        typing: Llvm,
        table: Llvm,
        blocks: Llvm,
        last_length: Llvm,
        flags: Llvm,
        first_flags: Llvm,
        last_flags: Llvm,
        ahead: Llvm,
        out: Llvm,
    ) -> tuple[Llvm, Callable[..., Llvm]]:
        """Compress LANES rows, chunks or parents of BLAKE3, side by side.

        At the address `table` are LANES int64, the rows' addresses, and as many more, their
        counters. Each row has `blocks` blocks of 64 bytes, of which the last counts as
        `last_length` long. `flags` go with every block, `first_flags` and `last_flags` with the
        first and the last in addition. The chaining values, LANES * 32 bytes, go to the address
        `out`, after all input has been read. What lies `ahead` bytes behind each block is brought
        into the cache; it need not exist.
        """
        word = _types.int64
        return _types.void(word, word, word, word, word, word, word, word), _hash_rows_of(lanes)

    return _intrinsic(hash_rows)


def _hash_rows_of(lanes: int) -> Callable[..., Llvm]:
    words, longs = _ir.VectorType(_I32, lanes), _ir.VectorType(_I64, lanes)

    def generate(context: Llvm, builder: Llvm, signature: Llvm, args: Sequence[Llvm]) -> Llvm:
        table, addresses = (builder.inttoptr(args[0], kind.as_pointer()) for kind in (_I8, _I64))
        blocks, last_length, flags, first_flags, last_flags, ahead = args[1:7]
        rows = [
            builder.inttoptr(builder.load(builder.gep(addresses, [_I64(lane)])), _I8.as_pointer())
            for lane in range(lanes)
        ]
        counters = _load(builder, longs, table, _I64(8 * lanes))
        counter_low = builder.trunc(counters, words)
        counter_high = builder.trunc(builder.lshr(counters, _splat(longs, 32)), words)
        chaining = [_cgutils.alloca_once_value(builder, _splat(words, value)) for value in IV]
        last = builder.sub(blocks, _I64(1))
        with _cgutils.for_range(builder, blocks) as loop:
            at = builder.mul(loop.index, _I64(64))
            message = _load_message(builder, words, rows, at)
            at_ahead = builder.add(at, ahead)
            for row in rows:
                _prefetch(builder, builder.gep(row, [at_ahead]))
            is_first = builder.icmp_signed("==", loop.index, _I64(0))
            is_last = builder.icmp_signed("==", loop.index, last)
            length = builder.select(is_last, last_length, _I64(64))
            flags_here = builder.or_(flags, builder.select(is_first, first_flags, _I64(0)))
            flags_here = builder.or_(flags_here, builder.select(is_last, last_flags, _I64(0)))
            state = [builder.load(place) for place in chaining]
            state += [_splat(words, value) for value in IV[:4]]
            state += [counter_low, counter_high]
            state += [_broadcast(builder, words, length), _broadcast(builder, words, flags_here)]
            for place, value in zip(chaining, _compress(builder, state, message), strict=True):
                builder.store(value, place)
        target = builder.inttoptr(args[7], _I8.as_pointer())
        results = [builder.load(place) for place in chaining]
        for first in range(0, lanes, 8):
            for lane, row in enumerate(_transpose(builder, [_part(builder, value, first, 8) for value in results])):
                _store(builder, row, target, _I64(32 * (first + lane)))
        return context.get_dummy_value()

    return generate


@_intrinsic  # type: ignore[untyped-decorator]
def set_rows(
    typing: Llvm, table: Llvm, first: Llvm, stride: Llvm, last: Llvm, counter: Llvm, step: Llvm
) -> tuple[Llvm, Callable[..., Llvm]]:
    """Write a table for `hash_rows`: rows at the addresses `first`, `first` + `stride`, ..., none beyond `last`, with
    the counters `counter`, `counter` + `step`, ...."""
    word = _types.int64

    def generate(context: Llvm, builder: Llvm, signature: Llvm, args: Sequence[Llvm]) -> Llvm:
        longs = _ir.VectorType(_I64, LANES)
        table = builder.inttoptr(args[0], _I8.as_pointer())
        lane = _ir.Constant(longs, [_ir.Constant(_I64, i) for i in range(LANES)])
        first, stride, last, counter, step = (_broadcast(builder, longs, value) for value in args[1:])
        rows = builder.add(first, builder.mul(stride, lane))
        rows = builder.select(builder.icmp_unsigned("<", rows, last), rows, last)
        _store(builder, rows, table, _I64(0))
        _store(builder, builder.add(counter, builder.mul(step, lane)), table, _I64(8 * LANES))
        return context.get_dummy_value()

    return _types.void(word, word, word, word, word, word), generate


@_intrinsic  # type: ignore[untyped-decorator]
def copy_row(typing: Llvm, source: Llvm, target: Llvm) -> tuple[Llvm, Callable[..., Llvm]]:
    """Copy the 32 bytes of a chaining value from address to address."""

    def generate(context: Llvm, builder: Llvm, signature: Llvm, args: Sequence[Llvm]) -> Llvm:
        source, target = (builder.inttoptr(arg, _I8.as_pointer()) for arg in args)
        _store(builder, _load(builder, _ir.VectorType(_I32, 8), source, _I64(0)), target, _I64(0))
        return context.get_dummy_value()

    return _types.void(_types.int64, _types.int64), generate


def _prefetch(builder: Llvm, place: Llvm) -> None:
    pointer = place.type
    kind = _ir.FunctionType(_ir.VoidType(), [pointer, _I32, _I32, _I32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    # To be read, into the first cache, as data.
    builder.call(prefetch, [place, _I32(0), _I32(3), _I32(1)])


def block_sums_by(lanes: int) -> Llvm:
    """Return the function `block_sums` for vectors of so many words."""
    halves = _ir.VectorType(_I16, 2 * lanes)
    step = 4 * lanes

    def block_sums(typing: Llvm, data: Llvm, start: Llvm, steps: Llvm) -> tuple[Llvm, Callable[..., Llvm]]:
        """Return a | b << 16 of the SUM_STEP * `steps` bytes from byte `start` of `data`.

        Lanes of 16 bits suffice, for the sums are modulo 2**16: one for each two bytes of a step.
        Each lane sums its pairs of bytes, as the number that they are, and the higher ones of them
        alone, from which the sum of the lower ones follows at the end. And it sums those sums,
        which weighs them by step; what its place within the step adds to the weight is set right
        at the end, too.
        """

        def generate(context: Llvm, builder: Llvm, signature: Llvm, args: Sequence[Llvm]) -> Llvm:
            row = builder.gep(_bytes_of(context, builder, signature.args[0], args[0]), [args[1]])
            zero = _splat(halves, 0)
            pairs, odd, pairs_sum, odd_sum = (_cgutils.alloca_once_value(builder, zero) for _ in range(4))
            with _cgutils.for_range(builder, args[2]) as loop:
                both = _load(builder, halves, row, builder.mul(loop.index, _I64(step)))
                for plain, summed, part in (
                    (pairs, pairs_sum, both),
                    (odd, odd_sum, builder.lshr(both, _splat(halves, 8))),
                ):
                    total = builder.add(builder.load(plain), part)
                    builder.store(total, plain)
                    builder.store(builder.add(builder.load(summed), total), summed)
            upper, upper_sum = builder.load(odd), builder.load(odd_sum)
            lower, lower_sum = (
                builder.sub(builder.load(both), builder.mul(above, _splat(halves, 256)))
                for both, above in ((pairs, upper), (pairs_sum, upper_sum))
            )
            weighed = zero
            for plain, summed, first in ((lower, lower_sum, 0), (upper, upper_sum, 1)):
                place = _ir.Constant(halves, [_ir.Constant(_I16, 2 * i + first) for i in range(2 * lanes)])
                by_step = builder.mul(summed, _splat(halves, step))
                weighed = builder.add(weighed, builder.sub(by_step, builder.mul(plain, place)))
            total = builder.add(lower, upper)
            a, b = (builder.zext(_sum_lanes(builder, vector), _I32) for vector in (total, weighed))
            return builder.or_(a, builder.shl(b, _I32(16)))

        return _types.uint32(data, _types.int64, _types.int64), generate

    return _intrinsic(block_sums)


hash_rows = hash_rows_by(LANES)
block_sums = block_sums_by(LANES)


def _sum_lanes(builder: Llvm, vector: Llvm) -> Llvm:
    count = vector.type.count
    while count > 1:
        count //= 2
        vector = builder.add(_part(builder, vector, 0, count), _part(builder, vector, count, count))
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
