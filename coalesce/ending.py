"""How watches and sessions end: cancelled by their client, by the end of their stream, or by the proxy.

A created watch ends only in the ways in which etcd ends one: `canceled` with a compact_revision, or the end of its
stream. Clients do not expect any other: on `canceled` with only a reason python-etcd3 and aetcd wait without end. So a
restored store (another history) is reported as a compaction: at the end of a stream clientv3 and Node's etcd3 resume
from a revision that the restored store does not have, and wait for it; on a compaction every client starts again. A
watch that is lost for any other reason ends with its session, UNAVAILABLE: the client opens it again, and if etcd still
refuses it, its create is answered with that refusal. `losing` decides which watches end so.

Each step ends a bounded number of watches and sessions; the rest follows at the next timers, which are due at once.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from coalesce.model import PendingCreate, Session, Watch
from coalesce.place import Place
from coalesce.placement import Placement
from coalesce.progress import Progress
from coalesce.replay import Replayer
from coalesce.revision_reads import RevisionReads
from coalesce.state import CoreState
from coalesce.trunk import Trunks
from proto import etcd_errors
from proto.framing import Status
from proto.scan import Header

# Watches of a session that are removed when it ends; the rest is removed at the next timers. Until then they behave
# like those of a client that does not read: bytes written to them are discarded.
REMOVED_AT_ONCE = 8
# The end of a session takes as long as the removal of so many watches.
SESSION_WATCHES: Final = 10
OTHER_HISTORY = "watchmux: the history of the store was replaced (restored from a snapshot?)"


class Cancellation:
    """Ends watches and sessions."""

    def __init__(
        self,
        state: CoreState,
        reads: RevisionReads,
        progress: Progress,
        placement: Placement,
        replayer: Replayer,
        trunks: Trunks,
    ) -> None:
        self._state = state
        self._reads = reads
        self._progress = progress
        self._placement = placement
        self._replayer = replayer
        self._trunks = trunks

    # by the client

    def cancel(self, session: Session, watch_id: int) -> None:
        """Cancel a watch for its client. An unknown id gets no answer."""
        state = self._state
        watch = session.watches.get(watch_id)
        if watch is not None:
            self.remove(watch)
        elif session.compacted is not None and watch_id in session.compacted:
            session.compacted.discard(watch_id)
            state.stats.ids_kept -= 1
            if not session.compacted:
                session.compacted = None
        else:
            return
        state.stats.cancels += 1
        state.answer(session, watch_id, state.header_now(), canceled=True)

    def close(self, session: Session) -> None:
        """Drop a session and everything it holds."""
        state = self._state
        session.ended = True
        self._drop_queue(session)
        self._progress.forget_session(session)
        self._replayer.forget(session)
        state.note_behind(session)
        state.stats.ids_kept -= len(session.compacted or ())
        session.compacted = None
        state.to_end.pop(session, None)
        del state.sessions[session]
        state.stats.sessions -= 1
        self._remove_some(session, REMOVED_AT_ONCE)
        if session.watches:
            state.leaving[session] = None

    def _drop_queue(self, session: Session) -> None:
        """Drop the pending requests of a session that has ended."""
        state = self._state
        queue, session.queue = session.queue, None
        state.to_advance.pop(session, None)
        state.to_advance_later.pop(session, None)
        state.stats.line_bytes -= session.line_bytes
        session.line_bytes = 0
        for request in queue or ():
            if isinstance(request, PendingCreate):
                self._trunks.release(request)
                self._reads.forget(request)

    def _remove_some(self, session: Session, count: int) -> int:
        """Remove up to `count` watches of an ended session; return `count` less those removed."""
        for watch in list(islice(session.watches.values(), count)):
            self.remove(watch)
            count -= 1
        return count

    def expire(self) -> None:
        """End the sessions in `to_end`, and remove watches of ended sessions, as many as a step allows."""
        state = self._state
        left = self._end_some(state.limits.step_watches_max)
        while state.leaving and left > 0:
            session = next(iter(state.leaving))
            left = self._remove_some(session, left)
            if not session.watches:
                del state.leaving[session]

    def end(self, session: Session, status: int, text: str) -> None:
        """Close a session on the proxy's initiative, and end its stream."""
        if session.ended:
            return
        self.close(session)
        self._state.stats.sessions_ended += 1
        self._state.end_session(session, status, text)

    # by the proxy

    def no_leader(self) -> None:
        """No endpoint has a leader: end the sessions that require one (`hasleader`)."""
        state = self._state
        of_leader = (session for session in state.sessions if session.identity.has_leader)
        state.to_end.update((session, etcd_errors.NO_LEADER) for session in of_leader)
        self._end_some(state.limits.step_watches_max)

    def _end_some(self, left: int) -> int:
        """End some of the sessions in `to_end`; return how many watches may still be ended in this step."""
        for session, text in list(islice(self._state.to_end.items(), max(1, left // SESSION_WATCHES))):
            left -= SESSION_WATCHES
            self.end(session, Status.UNAVAILABLE, text)
        return left

    def too_far_behind(self) -> None:
        """End the sessions that have been behind for longer than allowed."""
        state = self._state
        limit = state.limits.lagging_age_s_max
        if limit is None:
            return
        for session in tuple(state.lagging_sessions):
            since = session.lagging_since
            if since is None or since + limit > state.now:
                return
            state.stats.refused_at["lagging_age_s_max"] += 1
            self.end(session, Status.UNAVAILABLE, f"watchmux: the client has been behind for more than {limit:g} s")

    # how

    def remove(self, watch: Watch) -> None:
        """Remove a watch everywhere."""
        state = self._state
        self._placement.unplace(watch)
        watch.place = Place.ENDED
        del watch.session.watches[watch.watch_id]
        watch.trunk.quit(watch)
        self._placement.detach(watch)
        state.stats.watches -= 1
        self._progress.forget(watch)
        self._trunks.unused(watch.trunk)

    def cancel_compacted(self, watch: Watch, compact_revision: int, restored: Header | None = None) -> None:
        """Cancel a watch as compacted; its id stays taken. `restored`: the header of a restored store."""
        state = self._state
        session = watch.session
        self.remove(watch)
        if session.ended:
            # The session's watches are removed without an answer.
            return
        if session.compacted is None:
            session.compacted = set()
        session.compacted.add(watch.watch_id)
        state.stats.ids_kept += 1
        state.stats.compacted += 1
        state.answer(
            session,
            watch.watch_id,
            restored or state.header_now(),
            canceled=True,
            compact_revision=compact_revision,
            cancel_reason="" if restored is None else OTHER_HISTORY,
        )
