"""Finding the create that ends the streams it is sent on.

One create may end its whole stream at etcd, for instance when it is larger than etcd accepts. Creates that were not
answered when a stream ended are *suspects*: they are tried on a separate stream, on which a probe is answered first, so
that server and token are known to work. When that stream ends as well, the suspects are split into two halves, each
with a stream of its own; a single suspect is the cause. Suspects that are answered move to their regular streams. So
each create is tried a bounded number of times (2 + log2 of the suspects), and live watches only register again.
"""

from __future__ import annotations

from collections.abc import Sequence

from upstream.watching.stream import Registration, WatchStream


class SuspectGroups:
    """Numbers groups of suspects: each is tried on a stream of its own."""

    def __init__(self) -> None:
        self._groups = 0
        # Some groups wait until others are done.
        self.waiting = False

    def judge(self, stream: WatchStream) -> Sequence[Registration]:
        """Handle a stream that may have ended because of an unanswered create. Return the creates that surely did."""
        suspects = stream.unanswered
        if not (stream.tested and stream.answered):
            self._suspect(suspects)
        elif len(suspects) > 1:
            middle = len(suspects) // 2
            self._suspect(suspects[:middle])
            self._suspect(suspects[middle:])
        elif len(stream.creating) > 1:
            # A create whose watch was closed since may also be the cause.
            self._suspect(suspects)
        else:
            return suspects
        return ()

    def _suspect(self, registrations: Sequence[Registration]) -> None:
        """Put these into a new group, which is tried on a separate stream."""
        self._groups += 1
        for registration in registrations:
            registration.group = self._groups
