"""How watches and sessions end: cancelled by their client, by a compaction, or because their upstream watch is lost.

A compaction cancels only watches that missed events: a watch whose next revision is the compact revision or later stays
open. The id of a watch that it cancelled stays taken until the client cancels it too, as in etcd.

When etcd refuses an upstream watch (because of its token), it is reopened with the token of another session that needs
it; when none is left, or the shell reports the upstream watch as lost, its sessions end UNAVAILABLE, so that their
clients reconnect with new tokens or to another endpoint.

A created watch ends only in the ways in which etcd ends one: `canceled` with a compact_revision, or the end of its
stream. Clients do not expect any other: on `canceled` with only a reason python-etcd3 and aetcd wait without end. So a
restored store (another history) is reported as a compaction: at the end of a stream clientv3 and Node's etcd3 resume
from a revision that the restored store does not have, and wait for it; on a compaction every client starts again. A
watch that is lost for any other reason ends with its session, UNAVAILABLE: the client opens it again, and if etcd still
refuses it, its create is answered with that refusal.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from coalesce.cover import Cover
from coalesce.inputs import UpstreamLost
from coalesce.model import Backfill, PendingCreate, Session, Source, Trunk, Upstream, Watch
from coalesce.place import Place
from coalesce.placement import Placement
from coalesce.progress import Progress
from coalesce.replay import Replayer
from coalesce.revision_reads import RevisionReads
from coalesce.state import CoreState
from coalesce.trunk import Trunks
from proto import etcd_errors
from proto.framing import Status
from proto.scan import Header, WatchResponse

# A cover that etcd has refused is tried again after this time: permissions change.
COVER_RETRY_S: Final = 60.0
# Statuses with which etcd ends the stream of a create; any other is a refusal of the create alone. RESOURCE_EXHAUSTED:
# the request is larger than etcd accepts.
_ENDS_OF_STREAMS = (Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED)
# Watches of a session that are removed when it ends; the rest is removed at the next timers. Until then they behave
# like those of a client that does not read: bytes written to them are discarded.
REMOVED_AT_ONCE = 8
OTHER_HISTORY = "watchmux: the history of the store was replaced (restored from a snapshot?)"


class Cancellation:
    """Ends watches and sessions."""

    __slots__ = ("_placement", "_progress", "_reads", "_replayer", "_state", "_trunks")

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
            self._remove(watch)
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
            self._remove(watch)
            count -= 1
        return count

    def expire(self) -> None:
        """Remove watches of sessions that have ended, as many as a step allows."""
        state = self._state
        left = state.limits.step_watches_max
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

    # by etcd

    def canceled(self, upstream: Upstream, response: WatchResponse) -> None:
        """Etcd has cancelled an upstream watch: by compaction, or because it refuses the watch."""
        owner = upstream.owner
        self._state.close_upstream(upstream, gone=True)
        if isinstance(owner, Trunk) and not owner.is_used:
            self._trunks.remove(owner, gone=True)
            return
        if response.compact_revision:
            self._state.compact_revision = max(self._state.compact_revision, response.compact_revision)
            self._compacted(owner, response.compact_revision)
            return
        self._refused(upstream, response.cancel_reason or etcd_errors.WATCH_CANCELED)

    def lost(self, upstream: Upstream, reason: UpstreamLost) -> None:
        """The shell reports an upstream watch as lost; if its token was refused, those of other sessions are tried."""
        if upstream.closed:
            return
        self._state.close_upstream(upstream, gone=True)
        if etcd_errors.is_auth_refusal(reason.status, reason.text):
            self._refused(upstream, reason.text)
        else:
            self._lose(upstream.owner, reason)

    def _refused(self, upstream: Upstream, text: str) -> None:
        """Etcd has refused an upstream watch: reopen it with another token, or end what depends on it."""
        owner = upstream.owner
        owner.refused_tokens.update(upstream.said_token or (upstream.token,))
        if isinstance(owner, Trunk) and not owner.is_used:
            self._trunks.remove(owner, gone=True)
        elif next(upstream.tokens(), None) is not None:
            self._reopen(owner)
        else:
            self._lose(owner, UpstreamLost(Status.UNAVAILABLE, text))

    def no_leader(self) -> None:
        """No endpoint has a leader: end the sessions that require one (`hasleader`)."""
        for session in [session for session in self._state.sessions if session.identity.has_leader]:
            self.end(session, Status.UNAVAILABLE, etcd_errors.NO_LEADER)

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

    def other_history(self, header: Header) -> None:
        """Drop everything learnt from etcd: the revision from which on the histories differ is unknown."""
        state = self._state
        state.header, state.header_at = header, state.now
        self._trunks.drop_parked()
        for trunk in list(state.trunks.values()):
            for watch in list(trunk.watches):
                # A watch of the future that received nothing yet may go on waiting.
                fresh = watch.is_early and watch.progress_floor >= watch.position
                if not fresh or watch.position <= header.revision:
                    self._cancel_compacted(watch, header.revision, OTHER_HISTORY)
            self._restart(trunk, header.revision + 1)
            for create in trunk.joining:
                if create.header is not None:
                    self._reads.read_again(create)
        self._reads.drop_answered()
        state.compact_revision = 0
        self._progress.other_history()
        for session in state.sessions:
            session.progress_revision = min(session.progress_revision, header.revision)

    # how

    def _remove(self, watch: Watch) -> None:
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

    def _cancel_compacted(self, watch: Watch, compact_revision: int, reason: str = "") -> None:
        """Cancel a watch as compacted, or (with a `reason`) as lost; its id stays taken."""
        state = self._state
        session = watch.session
        self._remove(watch)
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
            state.header_now(),
            canceled=True,
            compact_revision=compact_revision,
            cancel_reason=reason,
        )

    def _compacted(self, owner: Source, compact_revision: int) -> None:
        """Cancel the watches whose next events are compacted; give the others a new source."""
        if compact_revision <= owner.next_revision:
            # Nothing was missed.
            self._reopen(owner)
            return
        if isinstance(owner, Backfill):
            concerned = list(owner.watches)
        else:
            assert isinstance(owner, Trunk), "there are two kinds of source"
            concerned = [watch for watch in owner.watches if not _on_backfill(watch)]
        for watch in concerned:
            if watch.next_revision < compact_revision:
                self._cancel_compacted(watch, compact_revision)
        survivors = [watch for watch in concerned if watch.place is not Place.ENDED]
        if isinstance(owner, Backfill):
            self._lift_all(survivors)
            self._placement.close(owner, gone=True)
            self._placement.place(survivors)
            if owner.is_upgrade:
                self._placement.restore_upgrade(owner.trunk)
        elif not owner.is_used:
            # All of them were cancelled just now.
            self._trunks.remove(owner, gone=True)
        else:
            self._drop_upgrade(owner)
            self._lift_all(survivors)
            self._trunks.reopen(owner, compact_revision)
            self._placement.place(survivors)

    def _reopen(self, owner: Source) -> None:
        """Reopen a source's upstream watch at its next revision, with a token that etcd has not refused."""
        if isinstance(owner, Trunk):
            self._trunks.reopen(owner, owner.next_revision)
        elif isinstance(owner, Backfill):
            owner.paused = False
            self._state.open_upstream(owner, owner.next_revision, owner.history.has_prev_kv, not owner.is_upgrade)

    def _lose(self, owner: Source, reason: UpstreamLost) -> None:
        """End the sessions and creates that depend on a lost source."""
        state = self._state
        if isinstance(owner, Cover):
            self._lose_cover(owner, reason.text)
            return
        if isinstance(owner, Backfill):
            # Every watch of the trunk that wants prev_kv needs the upgrade, even if it is on another backfill.
            waiting = [watch for watch in owner.trunk.watches if owner.is_upgrade and watch.wants_prev_kv]
            watches, creates = list({**owner.watches, **dict.fromkeys(waiting)}), []
        else:
            assert isinstance(owner, Trunk), "there are two kinds of source"
            watches, creates = list(owner.watches), list(owner.joining)
        for watch in watches:
            self.end(watch.session, Status.UNAVAILABLE, reason.text)
            if watch.place is not Place.ENDED:
                self._remove(watch)
        for create in creates:
            if create.session.ended:
                continue
            if reason.status in _ENDS_OF_STREAMS:
                self.end(create.session, reason.status, reason.text)
            else:
                create.refusal = reason.text
                self._trunks.release(create)
                state.to_advance[create.session] = None
        if isinstance(owner, Trunk):
            self._trunks.remove(owner, gone=True)
        elif isinstance(owner, Backfill) and owner in state.backfills:
            self._placement.close(owner, gone=True)

    def _lose_cover(self, cover: Cover, text: str) -> None:
        """Etcd refuses a cover: its ranges get trunks of their own, until it is tried again."""
        state = self._state
        cover.stats.refused += 1
        cover.stats.problem = text
        if cover.prefix in state.covers.prefixes:
            state.covers.suspended[cover.prefix] = state.now + COVER_RETRY_S
        cover.retired = True
        cover.opening = False
        cover.awaited = False
        for create in tuple(cover.joining):
            self._trunks.release(create)
            state.to_prepare[create] = None
        if cover.watches:
            state.lingers.stop(cover)
            state.end_run(cover)
            state.to_move[cover] = None
        else:
            self._trunks.remove(cover, gone=True)

    def _restart(self, trunk: Trunk, next_revision: int) -> None:
        """Drop a trunk's state and restart it at `next_revision`."""
        state = self._state
        if trunk.opening and trunk.upstream.start_revision is None:
            return
        watches = list(trunk.watches)
        self._drop_upgrade(trunk)
        self._lift_all(watches)
        if not trunk.upstream.closed:
            state.close_upstream(trunk.upstream)
        trunk.start_over(next_revision)
        # Also drops the groups' sent revisions: events at or below them may be sent again.
        trunk.groups.clear()
        self._trunks.reopen(trunk, next_revision)
        self._placement.place(watches)

    def _lift_all(self, watches: Iterable[Watch]) -> None:
        """Remove watches from their places and sources."""
        for watch in watches:
            self._placement.unplace(watch)
            self._placement.detach(watch)
            # Temporary: the caller places it at once.
            watch.place = Place.LAGGING

    def _drop_upgrade(self, trunk: Trunk) -> None:
        """Close an upgrade, and let the trunk reopen with prev_kv itself."""
        upgrade = trunk.upgrade
        if upgrade is not None:
            self._placement.close(upgrade)
            trunk.prev_kv_from = trunk.next_revision
            trunk.history.has_prev_kv = True


def _on_backfill(watch: Watch) -> bool:
    """Whether a watch comes through a backfill, which a loss of its trunk does not affect."""
    return isinstance(watch.source, Backfill) and not watch.source.is_upgrade
