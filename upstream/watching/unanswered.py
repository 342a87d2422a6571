"""
Creates that etcd leaves unanswered though the connection lives.

Etcd answers at once, but lets a create wait for ever whose token it cannot know yet (see `create_timeout_s`). Then its
watches are given up, with that token. A create without a token can only be reported.
"""

from __future__ import annotations

from collections.abc import Iterable

from upstream.watching.call import UpstreamWatchCall
from upstream.watching.stream import WatchStream


class Unanswered:
    """What was found when last looked for."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        # Streams without a token whose oldest create is overdue.
        self.streams = 0

    @property
    def problem(self) -> str:
        """What is wrong, for people; "" when nothing is."""
        return f"etcd has not answered the creates of watches for {self._limit_s:g} s" if self.streams else ""

    def look(self, streams: Iterable[WatchStream], now: float) -> tuple[list[WatchStream], int]:
        """Look for them; return the streams that are to be given up, and how many creates are to be reported."""
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
