"""The C library for machine code: what is called by name in loops over many directories.

Directories are read by getdents64 and statx (both in glibc since 2.30).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

# Imported by name: only some of the numba versions we support carry type information.
_numba: Any = importlib.import_module("numba")
_types: Any = _numba.types

_F = TypeVar("_F", bound=Callable[..., Any])

#: How a directory is opened whose entries are read; what is no directory, and no link to one, fails.
OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# AT_SYMLINK_NOFOLLOW and, as lstat, AT_NO_AUTOMOUNT.
_AT_LSTAT = 0x100 | 0x800
BASIC_STATS = 0x7FF
ENOENT = 2
#: The type in a mode.
TYPE, DIRECTORY = 0o170000, 0o040000
#: Bytes of directory entries that are asked for at once.
ENTRIES = 1 << 16
# struct linux_dirent64 (getdents(2)): where the record's length, the type and the name are.
D_RECLEN, D_TYPE, D_NAME = 16, 18, 19

openat: Any = _types.ExternalFunction("openat", _types.int32(_types.int32, _types.uintp, _types.int32))
close: Any = _types.ExternalFunction("close", _types.int32(_types.int32))
getdents: Any = _types.ExternalFunction("getdents64", _types.intp(_types.int32, _types.uintp, _types.uintp))
statx: Any = _types.ExternalFunction(
    "statx", _types.int32(_types.int32, _types.uintp, _types.int32, _types.uint32, _types.uintp)
)
inotify_add_watch: Any = _types.ExternalFunction(
    "inotify_add_watch", _types.int32(_types.int32, _types.uintp, _types.uint32)
)
errno_location: Any = _types.ExternalFunction("__errno_location", _types.CPointer(_types.int32)())


def kernel(signature: str, nogil: bool = True, **options: Any) -> Callable[[_F], _F]:
    """Compile a function for ``signature``, once for all processes; with ``nogil``, other threads run while it does."""
    decorate: Callable[[_F], _F] = _numba.njit(signature, cache=True, nogil=nogil, **options)
    return decorate


@kernel("int32(int32, uintp, uintp)")
def lstat(directory: Any, name: Any, status: Any) -> Any:
    """Have statx fill ``status``, an address as that of ``name``; returns 0, or an error's number."""
    code = statx(np.int32(directory), np.uintp(name), np.int32(_AT_LSTAT), np.uint32(BASIC_STATS), np.uintp(status))
    return np.int32(0) if code == 0 else np.int32(errno_location()[0])
