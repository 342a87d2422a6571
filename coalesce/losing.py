"""How upstream watches end, and what becomes of their watches.

A compaction cancels only watches that missed events: a watch whose next revision is the compact revision or later stays
open. The id of a watch that it cancelled stays taken until the client cancels it too, as in etcd.

When etcd refuses an upstream watch (because of its token), it is reopened with the token of another session that needs
it; when none is left, or the shell reports the upstream watch as lost, its sessions end UNAVAILABLE, so that their
clients reconnect with new tokens or to another endpoint.

Each step ends a bounded number of watches. Until the last one of a source has ended, its upstream watch is closed, its
history is kept, and creates that need it wait (`CoreState.ending`).

When the store has another history (it was restored from a snapshot), all upstream watches are closed at once, so that
no watch gets events of both. Until all watches have been examined, no request is decided and nothing is replayed
(`CoreState.restoring`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from coalesce.cover import Cover
from coalesce.ending import SESSION_WATCHES, Cancellation
from coalesce.inputs import UpstreamLost
from coalesce.model import Backfill, PendingCreate, Source, Trunk, Upstream, Watch
from coalesce.place import Place
from coalesce.placement import Placement
from coalesce.progress import Progress
from coalesce.revision_reads import RevisionReads
from coalesce.state import CoreState, SourceEnd
from coalesce.trunk import BATCHES_DROPPED, Trunks
from proto import etcd_errors
from proto.framing import Status
from proto.scan import Header, WatchResponse

# A cover that etcd has refused is tried again after this time: permissions change.
COVER_RETRY_S: Final = 60.0
# Statuses with which etcd ends the stream of a create; any other is a refusal of the create alone. RESOURCE_EXHAUSTED:
# the request is larger than etcd accepts.
_ENDS_OF_STREAMS = (Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED)


class Losses:
    """Ends the watches of upstream watches that etcd has ended, or gives them another one."""

    def __init__(
        self,
        state: CoreState,
        reads: RevisionReads,
        progress: Progress,
        placement: Placement,
        trunks: Trunks,
        cancellation: Cancellation,
    ) -> None:
        self._state = state
        self._reads = reads
        self._progress = progress
        self._placement = placement
        self._trunks = trunks
        self._cancellation = cancellation

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

    def other_history(self, header: Header) -> None:
        """Drop everything learnt from etcd: the revision from which on the histories differ is unknown."""
        state = self._state
        state.header, state.header_at = header, state.now
        state.restored = header
        state.compact_revision = 0
        # No watch gets events of both histories. Trunks that open from now have none yet.
        for upstream in state.upstreams:
            upstream.closed = upstream.created or upstream.start_revision is not None
        state.upstreams = {upstream: None for upstream in state.upstreams if not upstream.closed}
        state.to_ask.clear()
        state.ending.clear()
        for source in tuple(state.runs):
            state.end_run(source)
        state.restoring = dict.fromkeys(state.trunks.values())
        self._reads.drop_answered()
        self._progress.other_history()
        for session in state.sessions:
            session.progress_revision = min(session.progress_revision, header.revision)
        self.restore()

    def _compacted(self, owner: Source, compact_revision: int) -> None:
        """Cancel the watches whose next events are compacted; give the others a new source."""
        if compact_revision <= owner.next_revision:
            # Nothing was missed.
            self._reopen(owner)
            return
        if isinstance(owner, Backfill):
            owner.paused = False
        self._begin(owner, compact_revision)

    def _reopen(self, owner: Source) -> None:
        """Reopen a source's upstream watch at its next revision, with a token that etcd has not refused."""
        if isinstance(owner, Trunk):
            self._trunks.reopen(owner, owner.next_revision)
        elif isinstance(owner, Backfill):
            owner.paused = False
            self._state.open_upstream(owner, owner.next_revision, owner.history.has_prev_kv, not owner.is_upgrade)

    def _lose(self, owner: Source, reason: UpstreamLost) -> None:
        """End the sessions and creates that depend on a lost source."""
        if isinstance(owner, Cover):
            self._lose_cover(owner, reason.text)
        else:
            self._begin(owner, reason)

    # in steps

    def _begin(self, owner: Source, reason: UpstreamLost | int) -> None:
        creates = list(owner.joining) if isinstance(owner, Trunk) else []
        self._state.ending[owner] = SourceEnd(reason, len(owner.watches), creates)
        self._go_on(owner, self._state.limits.step_watches_max)

    def expire(self) -> None:
        """Go on with the sources that end, over as many watches as one step allows."""
        ending, left = self._state.ending, self._state.limits.step_watches_max
        for source in list(islice(ending, left)):
            if left > 0 and source in ending:
                left = self._go_on(source, left)

    def _go_on(self, source: Source, left: int) -> int:
        """Examine up to `left` watches of a source that ends; return how many others may be examined in this step."""
        end = self._state.ending[source]
        if isinstance(end.reason, UpstreamLost):
            return self._end_sessions(source, end.reason, end.creates, left)
        examined = list(islice(source.watches, min(end.left, left)))
        for watch in examined:
            if watch.next_revision < end.reason and not (source is watch.trunk and _on_backfill(watch)):
                self._cancellation.cancel_compacted(watch, end.reason)
            else:
                _move_back(watch, source)
        end.left = min(end.left - len(examined), len(source.watches))
        if not end.left:
            del self._state.ending[source]
            self._survive(source, end.reason)
        return left - len(examined)

    def _survive(self, source: Source, compact_revision: int) -> None:
        """Give the watches of a compacted source, which have missed nothing, another one."""
        if isinstance(source, Backfill):
            survivors = list(source.watches)
            self._lift_all(survivors)
            self._close(source)
            self._placement.place(survivors)
            if source.is_upgrade:
                self._placement.restore_upgrade(source.trunk)
            return
        assert isinstance(source, Trunk), "there are two kinds of source"
        if not source.is_used:
            self._trunks.remove(source, gone=True)
            return
        survivors = [watch for watch in source.watches if not _on_backfill(watch)]
        self._drop_upgrade(source)
        self._lift_all(survivors)
        self._trunks.reopen(source, compact_revision)
        self._placement.place(survivors)

    def _end_sessions(self, source: Source, reason: UpstreamLost, creates: list[PendingCreate], left: int) -> int:
        """End sessions and creates that depend on a lost source; return what is left of `left`."""
        for watch in list(islice(source.watches, left)):
            left = self._end_session_of(watch, reason, left)
            if left <= 0:
                return 0
        trunk = source.trunk
        if source is trunk.upgrade:
            # Every watch of the trunk that wants prev_kv needs the upgrade, even if it is on another backfill.
            for watch in list(islice(trunk.watches, left)) if trunk.prev_kv_watches else ():
                if watch.place is not Place.ENDED and not watch.wants_prev_kv:
                    left -= 1
                    _move_back(watch, trunk)
                else:
                    left = self._end_session_of(watch, reason, left)
                if left <= 0:
                    return 0
        while creates:
            left = self._refuse(creates.pop(), reason, left)
            if left <= 0:
                return 0
        if source.watches or (source is trunk.upgrade and trunk.prev_kv_watches):
            return left
        self._state.ending.pop(source, None)
        if source is trunk:
            # Creates that came since: their tokens may be valid.
            self._prepare_again(trunk)
            self._trunks.remove(trunk, gone=True)
        elif isinstance(source, Backfill) and source in self._state.backfills:
            self._close(source)
        return left

    def _close(self, backfill: Backfill) -> None:
        """Close a backfill that etcd has ended; if it is an upgrade, creates with prev_kv may have waited for that."""
        self._placement.close(backfill, gone=True)
        if backfill.is_upgrade:
            self._state.to_advance.update((create.session, None) for create in backfill.trunk.joining)

    def _prepare_again(self, trunk: Trunk) -> None:
        """Let the creates that wait for a trunk which is removed get another one."""
        for create in tuple(trunk.joining):
            self._trunks.release(create)
            self._state.to_prepare[create] = None

    def _end_session_of(self, watch: Watch, reason: UpstreamLost, left: int) -> int:
        """End a watch and its session, whose other watches follow; return what is left of `left`."""
        if not watch.session.ended:
            left -= SESSION_WATCHES
            self._cancellation.end(watch.session, Status.UNAVAILABLE, reason.text)
        if watch.place is not Place.ENDED:
            left -= 1
            self._cancellation.remove(watch)
        return left

    def _refuse(self, create: PendingCreate, reason: UpstreamLost, left: int) -> int:
        """Refuse a create that waits for a lost trunk, or end its session; return what is left of `left`."""
        if create.session.ended or create.trunk is None:
            return left
        if reason.status in _ENDS_OF_STREAMS:
            self._cancellation.end(create.session, reason.status, reason.text)
            return left - SESSION_WATCHES
        create.refusal = reason.text
        self._trunks.release(create)
        self._state.to_advance[create.session] = None
        return left - 1

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
        self._prepare_again(cover)
        if cover.watches:
            state.lingers.stop(cover)
            state.end_run(cover)
            state.to_move[cover] = None
        else:
            self._trunks.remove(cover, gone=True)

    def restore(self) -> None:
        """Go on after a restore: end watches, and restart trunks, as many as one step allows."""
        state = self._state
        left = self._trunks.drop_parked(state.limits.step_watches_max)
        for trunk in list(islice(state.restoring, max(0, left))):
            if left > 0 and trunk in state.restoring:
                left = self._restore(trunk, left)
        if not state.restoring and not state.parked:
            state.restored = None

    def _restore(self, trunk: Trunk, left: int) -> int:
        """Examine up to `left` watches of a trunk, then restart it; return what is left of `left`."""
        state, header = self._state, self._state.restored
        assert header is not None, "a store is restored"
        count = state.restoring[trunk]
        if count is None:
            count = len(trunk.watches)
        examined = list(islice(trunk.watches, min(count, left)))
        for watch in examined:
            # A watch of the future that received nothing yet may go on waiting.
            fresh = watch.is_early and watch.progress_floor >= watch.position
            if fresh and watch.position > header.revision:
                _move_back(watch, trunk)
            else:
                self._cancellation.cancel_compacted(watch, header.revision, header)
        state.restoring[trunk] = count = min(count - len(examined), len(trunk.watches))
        left -= len(examined) + 1
        if count:
            return left
        del state.restoring[trunk]
        left -= len(trunk.history) // BATCHES_DROPPED
        self._restart(trunk, header.revision + 1)
        for create in trunk.joining:
            if create.header is not None:
                self._reads.read_again(create)
        return left

    def _restart(self, trunk: Trunk, next_revision: int) -> None:
        """Drop a trunk's state and restart it at `next_revision`, unless it opens from now."""
        watches = list(trunk.watches)
        self._drop_upgrade(trunk)
        for backfill in tuple(trunk.backfills):
            self._placement.close(backfill)
        self._lift_all(watches)
        if not trunk.opening or trunk.upstream.start_revision is not None:
            self._state.close_upstream(trunk.upstream)
            trunk.start_over(next_revision)
            # Also drops the groups' sent revisions: events at or below them may be sent again.
            trunk.groups.clear()
        if trunk.upstream.closed:
            # Also one that opens from now, if it was lost before the restore and not all its creates were refused yet.
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


def _move_back(watch: Watch, source: Source) -> None:
    """Let the other watches of a source be examined before this one."""
    del source.watches[watch]
    source.watches[watch] = None


def _on_backfill(watch: Watch) -> bool:
    """Whether a watch comes through a backfill, which a loss of its trunk does not affect."""
    return isinstance(watch.source, Backfill) and not watch.source.is_upgrade
