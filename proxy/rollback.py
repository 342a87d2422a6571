"""Whether the store has gone back: it was restored from a snapshot, and what was heard above that is true no more.

A `created` or a serializable read may be older than what is known, from a member that lags behind. A linearizable read
that began after something was known cannot. So every linearizable answer that comes, whatever was asked for, is held
against what was known when it was asked for. And since nobody may ask anything after a break, one read is made for the
watches that are open; with auth on by the right of whoever may: the first who is answered decides for all.

A store that has grown past what was known since it was restored is recognised by `upstream/watching/lineage.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice

from coalesce.source import Upstream
from proto.scan import Header
from proxy import logs
from proxy.reads import Asked, Reader

AGAIN_S = 1.0
"""While nobody was answered, others are tried after this: tokens are renewed, clients come back."""

LOOKED_AT = 1000
"""Of so many open watches the tokens are looked at, and of these so many tried at a time."""
TRIED_AT_ONCE = 8

log = logs.logger("rollback")


class Rollback:
    """Holds what is read against what is known."""

    def __init__(
        self, reader: Reader, known: Callable[[], int], own_token: Callable[[], bytes | None],
        went_back: Callable[[Header], None],
    ) -> None:  # fmt: skip
        """`known`: the newest revision that the watches have seen; `went_back` hears of a store that is older."""
        reader.observe = self.begin
        self._reader = reader
        self._known = known
        self._own_token = own_token
        self._went_back = went_back
        # The highest revision that a read found.
        self._newest_read = 0
        # Times that the store went back: what began in another time says nothing about this one.
        self._epoch = 0
        # Nothing has been read since the last connection.
        self._unproven = False
        self._tried: set[bytes | None] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Callable[[Header, bool], None]:
        """Return what is to be told the answer (and whether it is linearizable) of a read that begins now."""
        known = max(self._newest_read, self._known())
        epoch = self._epoch

        def take(header: Header, linearizable: bool) -> None:
            if epoch != self._epoch:
                return
            if linearizable:
                self._unproven = False
                if header.revision < known:
                    log.error("the store went back", from_revision=known, to_revision=header.revision)
                    self._epoch += 1
                    self._newest_read = header.revision
                    self._went_back(header)
            self._newest_read = max(self._newest_read, header.revision)

        return take

    def other_history(self, header: Header) -> None:
        """The store is known to be another one: what was read before says nothing about this one."""
        self._epoch += 1
        self._newest_read = header.revision

    def connected(self, watches: Iterable[Upstream]) -> None:
        """There is a new connection for the watches that are open (`watches` may change)."""
        self._unproven = True
        self._tried.clear()
        self._prove(watches)

    def stop(self) -> None:
        """Ask no more."""
        self._unproven = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _prove(self, watches: Iterable[Upstream]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._unproven:
            return
        for asked in islice(self._rights(watches), TRIED_AT_ONCE):
            self._reader.prove(asked, lambda: self._unproven)
        if self._unproven:
            self._timer = asyncio.get_running_loop().call_later(AGAIN_S, self._prove, watches)

    def _rights(self, watches: Iterable[Upstream]) -> Iterable[Asked]:
        """Walk the tokens that have not been tried, each with a range that it was good for."""
        own = self._own_token()
        for watch in tuple(islice(watches, LOOKED_AT)):
            # Not `watch.token`: that is remembered as the one that the watch was registered with.
            for token in (own, *islice(watch.tokens(), 1)) if own is not None else islice(watch.tokens(), 1):
                if token not in self._tried:
                    self._tried.add(token)
                    yield Asked(token, watch.key, watch.range_end)
