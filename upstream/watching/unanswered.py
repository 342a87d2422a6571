"""Creates that etcd leaves unanswered on a working connection.

etcd answers a create at once, except that one with a token it cannot know yet waits without end (see
`create_timeout_s`). Then the watches of that token's stream are given up. A create without a token is only reported.
"""

from __future__ import annotations

from collections.abc import Iterable

from upstream.watching.call import UpstreamWatchCall
from upstream.watching.stream import WatchStream


class UnansweredCreates:
    """The result of the last check for unanswered creates."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        # Streams without a token whose oldest create is overdue.
        self.streams = 0

    @property
    def problem(self) -> str:
        """The problem, for display; "" when there is none."""
        return f"etcd has not answered watch create requests for {self._limit_s:g} s" if self.streams else ""

    def look(self, streams: Iterable[WatchStream], now: float) -> tuple[list[WatchStream], int]:
        """Check the streams; return those to give up, and how many creates to report."""
        given_up: list[WatchStream] = []
        self.streams = reported = 0
        for stream in streams:
            call = stream.shell
            if isinstance(call, UpstreamWatchCall) and call.waits_for(now) >= self._limit_s:
                reported += call.report()
                if stream.token is None:
                    self.streams += 1
                else:
                    given_up.append(stream)
        return given_up, reported
