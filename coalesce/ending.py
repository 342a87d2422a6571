"""How watches and sessions end: cancelled by their client, by a compaction, or because etcd is lost to them.

A compaction cancels those who missed something and nobody else: a watch whose next revision is the compact revision
or later lives on. The id of a watch that it cancelled stays taken until the client cancels it too, as in etcd.

When etcd does not let an upstream watch be (its token is refused) it is opened anew with the token of another session
that wants it; when none is left, or the shell says that it is lost, its sessions end UNAVAILABLE, so that their
clients come back with new tokens or to another endpoint.

A created watch ends only in ways in which etcd ends one: `canceled` with a compact_revision, or the end of its stream.
Clients do not expect any other: on `canceled` with a reason alone python-etcd3 and aetcd wait for ever. So a restored
store (another history) is reported as a compaction: on the end of a stream clientv3 and Node's etcd3 resume by
themselves from a revision that the restored store does not have, and wait for it; on a compaction every client starts
again. A watch that is lost for any other reason ends with its session, UNAVAILABLE: the client opens it again, and if
etcd still refuses it, that is the answer to its create.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from coalesce.backfill import Backfill
from coalesce.inputs import UpstreamLost
from coalesce.session import Place, Session, Watch
from coalesce.trunk import Trunk
from proto.scan import Header, WatchResponse

if TYPE_CHECKING:
    from coalesce.hub import CoreState
    from coalesce.source import Source, Upstream

UNAVAILABLE = 14
# With these etcd ends the stream of a create where others are the answer to it: RESOURCE_EXHAUSTED, when the request is
# larger than etcd takes.
_ENDS_OF_STREAMS = (UNAVAILABLE, 8)
# What etcd says of a token: PERMISSION_DENIED, UNAUTHENTICATED, and these texts, whose code is that of many others
# (api/v3rpc/rpctypes/error.go).
_REFUSALS = (7, 16)
# Watches of a session that are removed as it ends; more of them go with the next rings of the timer. Until then they
# are as those of a client that does not read: what is written to them goes nowhere.
REMOVED_AT_ONCE = 8
USER_EMPTY = "etcdserver: user name is empty"
AUTH_OLD = "etcdserver: revision of auth store is old"
NO_LEADER = "etcdserver: no leader"
OTHER_HISTORY = "watchmux: the store has another history than before (restored from a snapshot?)"


class Cancellation:
    """Ends watches and sessions."""

    __slots__ = ("_hub",)

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub

    # by the client

    def cancel(self, session: Session, watch_id: int) -> None:
        """Cancel a watch for its client. An unknown id gets no answer."""
        hub = self._hub
        watch = session.watches.get(watch_id)
        if watch is not None:
            self._remove(watch)
        elif session.compacted is not None and watch_id in session.compacted:
            session.compacted.discard(watch_id)
            hub.stats.ids_kept -= 1
            if not session.compacted:
                session.compacted = None
        else:
            return
        hub.stats.cancels += 1
        hub.answer(session, watch_id, hub.header_now(), canceled=True)

    def close(self, session: Session) -> None:
        """Forget a session and all it has."""
        hub = self._hub
        session.ended = True
        hub.joining.forget(session)
        hub.progress.forget_session(session)
        hub.replays.forget(session)
        hub.stats.ids_kept -= len(session.compacted or ())
        session.compacted = None
        del hub.sessions[session]
        hub.stats.sessions -= 1
        self._remove_some(session, REMOVED_AT_ONCE)
        if session.watches:
            hub.leaving[session] = None

    def _remove_some(self, session: Session, count: int) -> int:
        """Remove so many watches of a session that has ended; return how many of the count are left."""
        for watch in list(islice(session.watches.values(), count)):
            self._remove(watch)
            count -= 1
        return count

    def expire(self) -> None:
        """Remove watches of sessions that have ended, as many as a step allows."""
        hub = self._hub
        left = hub.limits.step_watches_max
        while hub.leaving and left > 0:
            session = next(iter(hub.leaving))
            left = self._remove_some(session, left)
            if not session.watches:
                del hub.leaving[session]

    def end(self, session: Session, status: int, text: str) -> None:
        """Close a session from this side and have its stream ended."""
        if session.ended:
            return
        self.close(session)
        self._hub.stats.sessions_ended += 1
        self._hub.end_session(session, status, text)

    # by etcd

    def canceled(self, upstream: Upstream, response: WatchResponse) -> None:
        """Etcd has ended an upstream watch: by compaction, or because it does not let us watch."""
        owner = upstream.owner
        self._hub.close_upstream(upstream, gone=True)
        if isinstance(owner, Trunk) and not owner.watches and not owner.joining:
            self._hub.trunks.remove(owner, gone=True)
            return
        if response.compact_revision:
            self._hub.compact_revision = max(self._hub.compact_revision, response.compact_revision)
            self._compacted(owner, response.compact_revision)
            return
        self._refused(upstream, response.cancel_reason or "etcdserver: watch canceled")

    def lost(self, upstream: Upstream, reason: UpstreamLost) -> None:
        """The shell has given an upstream watch up; a refused token leaves hope in those of other sessions."""
        if upstream.closed:
            return
        self._hub.close_upstream(upstream, gone=True)
        if reason.status in _REFUSALS or reason.text in (USER_EMPTY, AUTH_OLD):
            self._refused(upstream, reason.text)
        else:
            self._lose(upstream.owner, reason)

    def _refused(self, upstream: Upstream, text: str) -> None:
        """Etcd does not let an upstream watch be: open it anew with another token, or give it up."""
        owner = upstream.owner
        owner.refused_tokens.update(upstream.said_token or (upstream.token,))
        if isinstance(owner, Trunk) and not owner.watches and not owner.joining:
            self._hub.trunks.remove(owner, gone=True)
        elif next(upstream.tokens(), None) is not None:
            self._reopen(owner)
        else:
            self._lose(owner, UpstreamLost(UNAVAILABLE, text))

    def no_leader(self) -> None:
        """No endpoint has a leader: end the sessions that asked to be told."""
        for session in [session for session in self._hub.sessions if session.identity.has_leader]:
            self.end(session, UNAVAILABLE, NO_LEADER)

    def too_far_behind(self) -> None:
        """End the sessions that have been behind for longer than allowed."""
        hub = self._hub
        limit = hub.limits.lagging_age_s_max
        if limit is None:
            return
        for session in tuple(hub.lagging_sessions):
            since = session.lagging_since
            if since is None or since + limit > hub.now:
                return
            hub.stats.refused_at["lagging_age_s_max"] += 1
            self.end(session, UNAVAILABLE, f"watchmux: the client has been behind for more than {limit:g} s")

    def other_history(self, header: Header) -> None:
        """Nothing that was heard is known to be true any more: nobody knows from where on the histories differ."""
        hub = self._hub
        hub.header, hub.header_at = header, hub.now
        hub.trunks.drop_parked()
        for trunk in list(hub.trunks_open.values()):
            for watch in list(trunk.watches):
                # A watch of the future that was told nothing yet may wait on.
                fresh = watch.place is Place.AHEAD and watch.progress_floor >= watch.position
                if not fresh or watch.position <= header.revision:
                    self._cancel_compacted(watch, header.revision, OTHER_HISTORY)
            self._restart(trunk, header.revision + 1)
            for create in trunk.joining:
                if create.header is not None:
                    hub.joining.read_again(create)
        hub.joining.drop_answered()
        hub.compact_revision = 0
        hub.progress.other_history()
        for session in hub.sessions:
            session.progress_revision = min(session.progress_revision, header.revision)

    # how

    def _remove(self, watch: Watch) -> None:
        """Take a watch out of everything."""
        hub = self._hub
        hub.unplace(watch)
        watch.place = Place.ENDED
        del watch.session.watches[watch.watch_id]
        del watch.trunk.watches[watch]
        watch.trunk.prev_kv_watches -= watch.wants_prev_kv
        hub.detach(watch)
        hub.stats.watches -= 1
        hub.progress.forget(watch)
        hub.trunks.unused(watch.trunk)

    def _cancel_compacted(self, watch: Watch, compact_revision: int, reason: str = "") -> None:
        """Cancel a watch that has missed what was compacted, or (`reason`) is lost; its id stays taken."""
        hub = self._hub
        session = watch.session
        self._remove(watch)
        if session.ended:
            # Its watches are being forgotten.
            return
        if session.compacted is None:
            session.compacted = set()
        session.compacted.add(watch.watch_id)
        hub.stats.ids_kept += 1
        hub.stats.compacted += 1
        hub.answer(
            session,
            watch.watch_id,
            hub.header_now(),
            canceled=True,
            compact_revision=compact_revision,
            cancel_reason=reason,
        )

    def _compacted(self, owner: Source, compact_revision: int) -> None:
        """Cancel those whose source can no longer bring them what they need; give the others a new one."""
        hub = self._hub
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
            hub.backfills.close(owner, gone=True)
            hub.place(survivors)
            if owner.is_upgrade:
                hub.backfills.restore_upgrade(owner.trunk)
        elif not owner.watches and not owner.joining:
            # All of them were cancelled just now.
            hub.trunks.remove(owner, gone=True)
        else:
            self._drop_upgrade(owner)
            self._lift_all(survivors)
            hub.trunks.reopen(owner, compact_revision)
            hub.place(survivors)

    def _reopen(self, owner: Source) -> None:
        """Open a source's upstream watch anew, where it stands, with whatever token is left."""
        if isinstance(owner, Trunk):
            self._hub.trunks.reopen(owner, owner.next_revision)
        elif isinstance(owner, Backfill):
            owner.paused = False
            owner.open(owner.next_revision, owner.history.has_prev_kv, not owner.is_upgrade)

    def _lose(self, owner: Source, reason: UpstreamLost) -> None:
        """End what depends on a source that is lost."""
        hub = self._hub
        if isinstance(owner, Backfill):
            # Who wants prev_kv needs the upgrade, wherever it is.
            waiting = [watch for watch in owner.trunk.watches if owner.is_upgrade and watch.wants_prev_kv]
            watches, creates = list({**owner.watches, **dict.fromkeys(waiting)}), []
        else:
            assert isinstance(owner, Trunk), "there are two kinds of source"
            watches, creates = list(owner.watches), list(owner.joining)
        for watch in watches:
            self.end(watch.session, UNAVAILABLE, reason.text)
            if watch.place is not Place.ENDED:
                self._remove(watch)
        for create in creates:
            if create.session.ended:
                continue
            if reason.status in _ENDS_OF_STREAMS:
                self.end(create.session, reason.status, reason.text)
            else:
                create.refusal = reason.text
                hub.trunks.release(create)
        if isinstance(owner, Trunk):
            hub.trunks.remove(owner, gone=True)
        elif isinstance(owner, Backfill) and owner in hub.backfills.open:
            hub.backfills.close(owner, gone=True)
        # Only now: the next create in a line may have waited for the same source.
        for create in creates:
            hub.joining.advance(create.session)

    def _restart(self, trunk: Trunk, next_revision: int) -> None:
        """Drop all that a trunk knows and begin anew, at `next_revision`."""
        hub = self._hub
        if trunk.opening and trunk.upstream.start_revision is None:
            return
        watches = list(trunk.watches)
        self._drop_upgrade(trunk)
        self._lift_all(watches)
        hub.close_upstream(trunk.upstream)
        trunk.start_over(next_revision)
        # With what their groups were sent: that is to come again.
        trunk.fanout.groups.clear()
        hub.trunks.reopen(trunk, next_revision)
        hub.place(watches)

    def _lift_all(self, watches: Iterable[Watch]) -> None:
        """Take watches off their places and sources."""
        for watch in watches:
            self._hub.unplace(watch)
            self._hub.detach(watch)
            # Until house() finds it a place nothing else happens.
            watch.place = Place.LAGGING

    def _drop_upgrade(self, trunk: Trunk) -> None:
        """Give an upgrade up, and let the trunk open with prev_kv itself."""
        upgrade = trunk.upgrade
        if upgrade is not None:
            self._hub.backfills.close(upgrade)
            trunk.prev_kv_from = trunk.next_revision
            trunk.history.has_prev_kv = True


def _on_backfill(watch: Watch) -> bool:
    """Whether a watch comes through a backfill that a loss of its trunk does not concern."""
    return isinstance(watch.source, Backfill) and not watch.source.is_upgrade
