"""From single answers to a verdict: one lost packet is not a dead server, one answer not a live one."""

from __future__ import annotations


class Health:
    """Counts successive answers: healthy after ``rise`` good ones, failed after ``fall`` bad ones.

    ``verdict`` is None until the first of the two is reached, and then holds until the other is.
    """

    def __init__(self, rise: int, fall: int) -> None:
        self.rise = rise
        self.fall = fall
        self.reset()

    def reset(self) -> None:
        """Forget all answers: what was true before a change of roles says nothing about after it."""
        self.verdict: bool | None = None
        self._last: bool | None = None
        self._run = 0

    def observe(self, ok: bool) -> bool | None:
        """Take one more answer into account and return the verdict."""
        self._run = self._run + 1 if ok == self._last else 1
        self._last = ok
        if self._run >= (self.rise if ok else self.fall):
            self.verdict = ok
        return self.verdict
