"""What can be wrong with a signature or a delta."""

from __future__ import annotations

from farshore.errors import FarshoreError


class SignatureCorrupt(FarshoreError):
    """The signature is damaged: {0}"""

    exit_code = 30


class DeltaCorrupt(FarshoreError):
    """The delta is damaged or does not fit its base: {0}"""

    exit_code = 31


class DeltaFileError(FarshoreError):
    """{0}: {1}"""

    exit_code = 32
