"""What source and replica of one group say to each other.

One connection carries one group, so that a group that is slow, held or paused never stands in the way of another:
TCP does the multiplexing and the back-pressure. The source leads and does not wait: transactions follow each other,
and the replica acknowledges them cumulatively: when they are durable, and again when its tree has them. A transaction
is ``Begin``, its operations, and ``Commit``. The content of a large file comes before the transaction that puts it into
place, as an upload (``Upload`` and its ``Chunk`` frames), in pieces between transactions and within them, so that it
holds nothing up.
"""

from __future__ import annotations

import msgspec

#: A file up to this size travels whole within its Put; above it, as an upload.
INLINE_MAX = 64 << 10
#: Uploads that may be open at once, until a Patch puts them into place or a Drop ends them.
MAX_UPLOADS = 16
#: Paths that one Look may name, and questions of a verification that may be unanswered at once.
MAX_LOOK = 100
MAX_QUESTIONS = 64


class _Message(msgspec.Struct, frozen=True, tag_field="t", array_like=True, forbid_unknown_fields=True):
    """Common settings: arrays instead of maps, as names of fields would outweigh small operations."""


class Meta(msgspec.Struct, frozen=True, array_like=True):
    """Metadata of a path: permission bits, numeric owner and group, times in ns, xattrs sorted by name."""

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: list[tuple[bytes, bytes]]


# --- operations: each describes a state to reach, so that doing one twice does no harm ---------------


class MakeDir(_Message, frozen=True, tag="d"):
    """``path`` is a directory with this metadata; what else stood there is removed."""

    root: int
    path: bytes
    meta: Meta


class Put(_Message, frozen=True, tag="f"):
    """``path`` is a file with this content."""

    root: int
    path: bytes
    meta: Meta
    data: bytes


class Patch(_Message, frozen=True, tag="p"):
    """``path`` is a file with the content of an upload, all of whose chunks were sent before."""

    root: int
    path: bytes
    meta: Meta
    upload: int


class Copy(_Message, frozen=True, tag="y"):
    """``path`` is a file with the content of the file at ``source``, whose BLAKE3-256 is ``digest``."""

    root: int
    path: bytes
    meta: Meta
    source_root: int
    source: bytes
    digest: bytes


class MakeSymlink(_Message, frozen=True, tag="s"):
    """``path`` is a symbolic link to ``target``."""

    root: int
    path: bytes
    meta: Meta
    target: bytes


class MakeNode(_Message, frozen=True, tag="n"):
    """``path`` is a fifo or a device node; ``kind`` is a FileKind, ``rdev`` a device number."""

    root: int
    path: bytes
    meta: Meta
    kind: int
    rdev: int


class Link(_Message, frozen=True, tag="l"):
    """``path`` is another name of the file at ``to`` in the same root."""

    root: int
    path: bytes
    to: bytes


class Move(_Message, frozen=True, tag="m"):
    """What is at ``path`` is at ``to`` from now on, replacing a file there."""

    root: int
    path: bytes
    to: bytes


class Remove(_Message, frozen=True, tag="r"):
    """Nothing is at ``path``; a directory goes with all that is below it."""

    root: int
    path: bytes


class SetMeta(_Message, frozen=True, tag="a"):
    """``path`` has this metadata."""

    root: int
    path: bytes
    meta: Meta


Operation = MakeDir | Put | Patch | Copy | MakeSymlink | MakeNode | Link | Move | Remove | SetMeta


class Names(_Message, frozen=True, tag="names"):
    """Whom the sender of this means by owners' and groups' numbers in what follows; see ``dbm.owners``."""

    users: dict[int, str]
    groups: dict[int, str]


# --- source to replica -------------------------------------------------------------------------------


class Hello(_Message, frozen=True, tag="hello"):
    """Opens a group's stream; ``roots`` are the protected paths by the names that the configuration gives them."""

    protocol: int
    group: str
    epoch: int
    roots: list[str]


class ListTree(_Message, frozen=True, tag="list?"):
    """Tell all that is in the replica's tree: the source does not know it.

    Without ``digests``, equal sizes and times will count as equal content.
    """

    digests: bool


class WantSignature(_Message, frozen=True, tag="sign?"):
    """The signature exchange of the paper: send the signature of the file at ``path``."""

    root: int
    path: bytes


class Begin(_Message, frozen=True, tag="begin"):
    """A transaction starts; the replica refuses another epoch than its own."""

    epoch: int
    seq: int


class Upload(_Message, frozen=True, tag="u"):
    """Content for a file begins to come: a delta stream, in the chunks that bear the number ``upload``.

    With ``based``, the delta refers to what ``path`` holds on the replica after the transactions before this frame. A
    Patch may put the content at another path of the same root.
    ``sparse``: zeros become holes. ``skip`` above 0 goes on with the upload that Welcome named for this path, of
    whose delta the replica has that many bytes; the chunks continue there.
    """

    upload: int
    root: int
    path: bytes
    based: bool
    sparse: bool
    skip: int


class Chunk(_Message, frozen=True, tag="c"):
    """The next piece of an upload's delta stream; ``last``: the stream is complete."""

    upload: int
    data: bytes
    last: bool


class Drop(_Message, frozen=True, tag="drop"):
    """An upload is not needed any more, complete or not."""

    upload: int


class Commit(_Message, frozen=True, tag="commit"):
    """The transaction is complete: make it durable, acknowledge it, and apply it.

    With ``more``, the next transaction belongs to the same state: the replica applies this one only together with all
    up to the first one without ``more``. On promotion an incomplete state is not applied.
    """

    seq: int
    more: bool = False


class Survey(_Message, frozen=True, tag="survey"):
    """Go over the whole tree, beside all other work, so that questions for digests can be answered.

    ``run`` names the verification: what was read for it before is not read again. ``contents``: with the files'
    contents, read at ``rate`` bytes/s at most (0: as fast as it goes). Told of by Surveyed.
    """

    run: bytes
    contents: bool
    rate: float


class EndSurvey(_Message, frozen=True, tag="survey-end"):
    """The verification is over: what was remembered for it can be forgotten."""


class WantDigests(_Message, frozen=True, tag="digests?"):
    """What are the digests of what lies in the directory ``path``? Answered by Digests, in no order with other answers.

    ``bucket``: -1, or only the names of this bucket (see ``dbm.verify.digests``).
    """

    number: int
    root: int
    path: bytes
    bucket: int


class Look(_Message, frozen=True, tag="look?"):
    """What is at these paths after all transactions before this frame? At most MAX_LOOK; answered by Seen."""

    number: int
    root: int
    paths: list[bytes]


class InStep(_Message, frozen=True, tag="in-step"):
    """Since the last full comparison, the replica has received everything."""


class Ping(_Message, frozen=True, tag="ping"):
    """Are you there?"""


FromSource = (
    Hello
    | ListTree
    | WantSignature
    | Begin
    | Upload
    | Chunk
    | Drop
    | Commit
    | InStep
    | Survey
    | EndSurvey
    | WantDigests
    | Look
    | Ping
    | Names
    | MakeDir
    | Put
    | Patch
    | Copy
    | MakeSymlink
    | MakeNode
    | Link
    | Move
    | Remove
    | SetMeta
)

# --- replica to source -------------------------------------------------------------------------------


class Partial(msgspec.Struct, frozen=True, array_like=True):
    """An upload that a broken link cut off: the replica has ``received`` bytes of its delta, with BLAKE3 ``digest``."""

    root: int
    path: bytes
    based: bool
    received: int
    digest: bytes


class Welcome(_Message, frozen=True, tag="welcome"):
    """``lineage`` names the history of this replica's tree: a source that knows another one compares in full.

    ``started`` is the last transaction that the replica has made durable; up to ``applied``, its tree has them too.
    ``doubts`` are paths where something did not fit into the tree: they must be sent anew. ``was_in_step``:
    this side was frozen and in step with the source when it became the replica, so a comparison need not read
    contents. ``uploads`` can be gone on with; those that are not are dropped when the replica is in step.
    """

    protocol: int
    lineage: bytes
    started: int
    was_in_step: bool
    uploads: list[Partial]
    applied: int
    doubts: list[tuple[int, bytes]]


class Refused(_Message, frozen=True, tag="refused"):
    """The stream is not accepted; ``epoch`` and ``owner`` are what the replica knows."""

    reason: str
    stale: bool
    epoch: int


class Ack(_Message, frozen=True, tag="ack"):
    """All transactions up to ``seq`` are durable."""

    seq: int


class Applied(_Message, frozen=True, tag="applied"):
    """The tree has all transactions up to ``seq``.

    ``stalled`` says why nothing more is applied at the moment, "" if nothing stands in the way.
    """

    seq: int
    stalled: str


class Cause(msgspec.Struct, frozen=True, array_like=True):
    """Why some metadata is not kept, of how many files (``more``: of more than that), and one of them."""

    text: str
    count: int
    example: bytes
    more: bool


class Unkept(_Message, frozen=True, tag="unkept"):
    """All metadata that the replica could not keep, as far as that is known now."""

    causes: list[Cause]


class Nak(_Message, frozen=True, tag="nak"):
    """Transaction ``seq`` (0: an upload) was not taken, nor will be anything that follows on this connection; or it was
    taken, but not all of it fits into the tree.

    With ``unknown_base``, what the source believes of ``path`` is wrong: it must forget it and send anew. Otherwise
    the cause is the replica's (a full disk, for example) and the same transaction may succeed later.
    """

    seq: int
    root: int
    path: bytes
    reason: str
    unknown_base: bool


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One path of the replica's tree; ``digest`` is BLAKE3-256 of a file's content."""

    root: int
    path: bytes
    kind: int
    meta: Meta
    size: int
    nlink: int
    rdev: int
    target: bytes | None
    digest: bytes | None


class Entries(_Message, frozen=True, tag="entries"):
    """A part of the answer to ListTree, parents before children."""

    entries: list[Entry]
    last: bool


class SignaturePart(_Message, frozen=True, tag="sign"):
    """A piece of the signature that was wanted."""

    data: bytes
    last: bool


class NoSignature(_Message, frozen=True, tag="no-sign"):
    """There is no file at the path that a signature was wanted of."""


class Uploaded(_Message, frozen=True, tag="uploaded"):
    """All of an upload is there and durable: a transaction that puts it into place need not wait for it."""

    upload: int


class Surveyed(_Message, frozen=True, tag="surveyed"):
    """How far the survey for ``run`` is: told every few seconds, and when it is ``done``.

    ``paths`` were seen and ``read`` bytes of content read since the question. ``roots`` has, at the end, the digest of
    all below each root. With a ``problem``, nothing more will be answered for this run.
    """

    run: bytes
    paths: int
    read: int
    done: bool
    roots: list[bytes]
    problem: str


class Item(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A name in a directory: the digest of what it names, and for a directory also of all ``below`` it."""

    name: bytes
    own: bytes
    below: bytes | None


class Digests(_Message, frozen=True, tag="digests"):
    """A part of the answer to WantDigests ``number``; with ``buckets``, each name is one byte, the number of a bucket.

    A directory that is not there has nothing in it.
    """

    number: int
    buckets: bool
    items: list[Item]
    last: bool


class Seen(_Message, frozen=True, tag="seen"):
    """A part of the answer to Look ``number``: what is there, with the digests of files that could be read.

    ``read``: bytes of content that were read since the survey began.
    """

    number: int
    entries: list[Entry]
    read: int
    last: bool


class Pong(_Message, frozen=True, tag="pong"):
    """I am here."""


FromReplica = (
    Welcome
    | Refused
    | Ack
    | Applied
    | Nak
    | Names
    | Entries
    | SignaturePart
    | NoSignature
    | Uploaded
    | Unkept
    | Surveyed
    | Digests
    | Seen
    | Pong
)
