"""The root of every error that Farshore raises on purpose.

An error's docstring is its message: ``raise PeerUnreachable("bak1", "timed out")`` prints
the docstring with the arguments filled in. ``exit_code`` is what the process ends with when
the error reaches the command line, so that scripts can tell causes apart.
"""

from __future__ import annotations

import inspect


class FarshoreError(Exception):
    """{0}"""

    exit_code = 1

    def __str__(self) -> str:
        template = inspect.cleandoc(type(self).__doc__ or "{0}")
        try:
            return template.format(*self.args)
        except (IndexError, KeyError):
            return " ".join([template, *map(str, self.args)])


class UsageError(FarshoreError):
    """{0}"""

    exit_code = 2


class ConfigError(FarshoreError):
    """{0}: {1}"""

    exit_code = 3


class StateError(FarshoreError):
    """State directory {0}: {1}"""

    exit_code = 4


class PeerUnreachable(FarshoreError):
    """Cannot reach {0}: {1}"""

    exit_code = 10


class PeerRefused(FarshoreError):
    """{0} refused: {1}"""

    exit_code = 11


class ProtocolError(FarshoreError):
    """Protocol error from {0}: {1}"""

    exit_code = 12


class StaleEpoch(FarshoreError):
    """Group {0}: epoch {1} is older than {2}, which is known here"""

    exit_code = 13


class NotInTime(FarshoreError):
    """{0}: not done within {1:g} s: {2}"""

    exit_code = 20


class UnsafePath(FarshoreError):
    """Unsafe path {0!r}: {1}"""

    exit_code = 21


class HookFailed(FarshoreError):
    """{0} failed: {1}"""

    exit_code = 22
