"""
Which create ends the streams it is sent on.

One create may end its whole stream at etcd, for instance when it is larger than etcd takes. Those that were not
answered when a stream ended are *suspects*: they are tried on a stream of their own, where a probe is answered first,
so that server and token are known to be well. When that stream ends as well, each half of them gets one; a single
suspect is guilty. Those that are answered go where they belong. So each create is tried a bounded number of times
(2 + log2 of the suspects), and what was live only registers again.
"""

from __future__ import annotations

from collections.abc import Sequence

from upstream.watching.stream import Registration, WatchStream


class Suspects:
    """Numbers groups of suspects: each is tried on a stream of its own."""

    __slots__ = ("_groups", "waiting")

    def __init__(self) -> None:
        self._groups = 0
        # There are groups that wait until others are through.
        self.waiting = False

    def judge(self, stream: WatchStream) -> Sequence[Registration]:
        """A stream was ended, maybe by a create that it has not answered. Return those that did it for certain."""
        suspects = stream.unanswered
        if not (stream.tested and stream.answered):
            self._suspect(suspects)
        elif len(suspects) > 1:
            middle = len(suspects) // 2
            self._suspect(suspects[:middle])
            self._suspect(suspects[middle:])
        elif len(stream.creating) > 1:
            # One that was sent and closed since may have done it as well.
            self._suspect(suspects)
        else:
            return suspects
        return ()

    def _suspect(self, registrations: Sequence[Registration]) -> None:
        """Have these tried together, apart from others."""
        self._groups += 1
        for registration in registrations:
            registration.group = self._groups
