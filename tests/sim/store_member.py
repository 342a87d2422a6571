"""A member that is the bundled store: its real pure parts, on the virtual clock.

It applies the same log as the model's members, each entry as the call that a client would make, and must reach the same
revision. Its watch streams accept requests, queue answers and encode them as the service does; the bytes are scanned as
in the proxy. Its output is checked against a truth that is independent of it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Any

from proto.pb import auth_pb2, rpc_pb2
from proto.scan import WatchResponse, scan_watch_response
from tests.sim.config import Config
from tests.sim.failure import SimulationFailure
from tests.sim.model_store import LEASE, Applied, Member, Store
from tests.sim.model_stream import CLUSTER_ID
from tests.sim.parts import Parts, StoreModules
from tests.sim.permissions import HALF, MIGHTY, Permissions

_LEASE_TTL_S = 1000
_COMPACT_KEYS = 2
_REVISION_FIRST = 1
_NEVER_COMPACTED = -1


class Disk:
    """The content of a journal's file: the store's recorder, and the input of the next start."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, int], Any] = {}
        self._leases: dict[int, int] = {}
        self._revision = _REVISION_FIRST
        self._compact_revision = _NEVER_COMPACTED
        self._auth: dict[str, bytes] = {}

    def changed(self, changes: Any) -> None:
        """Record the changes of one revision."""
        self._revision = changes[-1].mod_revision
        self._records.update({(record.mod_revision, record.sub_revision): record for record in changes})

    def compacted(self, revision: int) -> None:
        """Record that a compaction was decided."""
        self._compact_revision = revision

    def dropped(self, records: Iterable[Any]) -> None:
        """Delete records."""
        for record in records:
            del self._records[record.mod_revision, record.sub_revision]

    def granted(self, lease_id: int, ttl_s: int) -> None:
        """Record a lease."""
        self._leases[lease_id] = ttl_s

    def revoked(self, lease_id: int) -> None:
        """Delete a lease."""
        del self._leases[lease_id]

    def auth_changed(self, rows: dict[str, bytes]) -> None:
        """Record users and roles."""
        self._auth = rows

    def stored(self, store: StoreModules, member_id: int) -> Any:
        """Return the records that a start reads."""
        records = [self._records[place] for place in sorted(self._records)]
        leases = list(self._leases.items())
        return store.recorder.Stored(
            CLUSTER_ID, member_id, self._revision, self._compact_revision, records, leases, self._auth, []
        )


class StoreMember:
    """One member, with those attributes of the model's `Member` that the simulation uses."""

    ordered_progress = True
    has_server = True

    def __init__(
        self,
        modules: StoreModules,
        store: Store,
        member_id: int,
        permissions: Permissions,
        batch_revisions_max: int = 1000,
        fragment_bytes: int = 1 << 21,
    ) -> None:
        self.modules = modules
        self.store = store
        self.member_id = member_id
        self.permissions = permissions
        self.fragment_bytes = fragment_bytes
        self._batch_revisions_max = batch_revisions_max
        self._position = 0
        self._start()

    def _start(self) -> None:
        """Start empty."""
        self._disk = Disk()
        self.state = self._new_state()
        self._grant()
        auth = self.state.auth
        if self.permissions.enabled:
            _fill_auth(auth, self.permissions)
            self.state.auth_changed()

    def _new_state(self) -> Any:
        state = self.modules.state
        made = state.StoreState(state.StoreIdentity(CLUSTER_ID, self.member_id), lambda: LEASE, self._disk)
        made.watchable.limits = self.modules.watchable.WatchLimits(
            batch_revisions_max=self._batch_revisions_max,
            sync_watchers_max=3,
            sync_revisions_max=max(3, self._batch_revisions_max),
        )
        self.compacting = False
        return made

    def _grant(self) -> None:
        self.state.lease_grant(rpc_pb2.LeaseGrantRequest(ID=LEASE, TTL=_LEASE_TTL_S), 0.0)

    @property
    def behind(self) -> int:
        """How many log entries it has not applied."""
        return len(self.store.log) - self._position

    @property
    def index(self) -> int:
        """The index of the entry it applied last."""
        return self.store.index_base + self._position

    @property
    def revision(self) -> int:
        """The newest revision it has applied."""
        return self.state.mvcc.revision  # type: ignore[no-any-return]  # the module under test is untyped here

    @property
    def unsynced(self) -> int:
        """Watchers that have to catch up."""
        return self.state.watchable.unsynced  # type: ignore[no-any-return]

    @property
    def victims(self) -> int:
        """Watchers whose events did not fit in a queue."""
        return self.state.watchable.victims  # type: ignore[no-any-return]

    def apply_some(self, rng: random.Random) -> None:
        """Apply a few entries of the log."""
        self.apply(rng.randint(1, 4))

    def apply(self, count: int) -> None:
        """Apply the next entries of the log as one commit, then show them to the watchers."""
        for entry in self.store.log[self._position : self._position + count]:
            self._position += 1
            self._run(entry)
            if self.revision != entry.revision:
                raise SimulationFailure(f"a store applied {entry} and is at {self.revision}")
        self.state.publish()

    def _run(self, entry: Applied) -> None:
        user = MIGHTY[0].decode() if self.permissions.enabled else None
        state = self.state
        if entry.compact_revision:
            state.compact(rpc_pb2.CompactionRequest(revision=entry.compact_revision), user)
            self.compacting = True
        elif entry.revokes:
            state.lease_revoke(LEASE, user)
            self.state.lease_grant(rpc_pb2.LeaseGrantRequest(ID=LEASE, TTL=_LEASE_TTL_S), 0.0, user)
        else:
            state.txn(entry.request, user)

    def sync(self, _: random.Random) -> None:
        """Advance unsynced watchers."""
        self.state.watchable.sync()

    def retry_victims(self, _: random.Random | None = None) -> None:
        """Retry the victims' events."""
        self.state.watchable.retry_victims()

    def compact_step(self, _: random.Random | None = None) -> None:
        """Free some compacted revisions."""
        self.compacting = not self.state.mvcc.compact_step(_COMPACT_KEYS)

    def open_stream(self, token: bytes | None, channel_max: int) -> StoreStream:
        """Open a watch stream for the owner of the token; the channel has one size only."""
        state = self.state
        state.watchable.limits = self.modules.watchable.WatchLimits(
            queue_events_max=channel_max,
            batch_revisions_max=state.watchable.limits.batch_revisions_max,
            sync_watchers_max=state.watchable.limits.sync_watchers_max,
            sync_revisions_max=state.watchable.limits.sync_revisions_max,
        )
        return StoreStream(self, token)

    def restart(self) -> None:
        """Restart from the durable records, without connections."""
        revision, compact_revision = self.revision, self.state.mvcc.compact_revision
        stored = self._disk.stored(self.modules, self.member_id)
        self.state = self._new_state()
        self.state.load(stored, 0.0)
        self.compacting = compact_revision > 0
        if (self.revision, self.state.mvcc.compact_revision) != (revision, compact_revision):
            raise SimulationFailure(f"a store restarted at {self.revision}, it was at {revision}")

    def restore(self) -> None:
        """Restart from the restored store, without connections."""
        self._start()
        self._position = 0
        self.apply(len(self.store.log))

    def check(self) -> None:
        """Check that the store holds exactly what was written."""
        self.apply(self.behind)
        request = rpc_pb2.RangeRequest(key=b"\0", range_end=b"\0")
        found = self.state.range(request, MIGHTY[0].decode() if self.permissions.enabled else None)
        held = [(each.key, each.value, each.create_revision, each.mod_revision, each.version, each.lease)
                for each in found.kvs]  # fmt: skip
        wanted = [(each.key, each.value, *each[3:7]) for each in self.store.live()]
        if held != wanted or found.header.revision != self.store.revision:
            raise SimulationFailure(f"a store holds {held}, expected {wanted}")


def _fill_auth(auth: Any, permissions: Permissions) -> None:
    """Create the owners of the tokens, users with the same names."""
    for name in MIGHTY:
        auth.users[name.decode()] = auth_pb2.User(name=name, roles=["root"])
    half = auth_pb2.Permission(permType=auth_pb2.Permission.READ, key=b"\0", range_end=permissions.middle)
    auth.roles["root"] = auth_pb2.Role(name=b"root")
    auth.roles["half"] = auth_pb2.Role(name=b"half", keyPermission=[half])
    auth.users[HALF.decode()] = auth_pb2.User(name=HALF, roles=["half"])
    auth.enabled = True


class StoreStream:
    """One Watch call at a bundled store, with those attributes of the model's `ServerStream` that are used."""

    def __init__(self, member: StoreMember, token: bytes | None) -> None:
        self.member = member
        self.requests: deque[bytes] = deque()
        self.out: deque[WatchResponse] = deque()
        self._token = token
        self._stream: Any = member.state.watchable.open_stream()

    @property
    def spans(self) -> dict[int, tuple[bytes, bytes]]:
        """The range of each watch by its id."""
        return self._stream.spans  # type: ignore[no-any-return]

    @property
    def can_receive(self) -> bool:
        """Whether the service would read the next request."""
        maximum: int = self.member.modules.watch_requests.CONTROLS_MAX
        return bool(self.requests) and self._stream.queued_controls < maximum

    def receive(self, _: random.Random | None = None) -> None:
        """Handle one request."""
        if self.can_receive:
            request = rpc_pb2.WatchRequest.FromString(self.requests.popleft())
            self.member.modules.watch_requests.take_request(self._stream, request, self._check)

    def _check(self, key: bytes, range_end: bytes) -> None:
        permissions, errors = self.member.permissions, self.member.modules.errors
        if permissions.is_invalid(self._token):
            raise errors.StoreError(errors.INVALID_AUTH_TOKEN)
        user = None if self._token is None else self._token.decode()
        self.member.state.auth.check(user, key, range_end)

    @property
    def can_send(self) -> bool:
        """Whether there is an answer to write."""
        return self._stream.has_answers  # type: ignore[no-any-return]

    def send(self, rng: random.Random) -> None:
        """Write one answer; a compaction cancel may be repeated, as etcd does."""
        message = self._stream.take()
        if message is None:
            return
        batch = self.member.modules.watch_batch
        pieces = batch.encode_message(self.member.state.head, message, self.member.fragment_bytes)
        responses = [scan_watch_response(piece) for piece in pieces]
        self.out.extend(responses * (rng.choice((1, 1, 1, 2)) if message.compact_revision else 1))

    def take_bytes(self) -> bytes | None:
        """Return the next answer as written; None when there is none."""
        message = self._stream.take()
        batch = self.member.modules.watch_batch
        return None if message is None else b"".join(batch.encode_message(self.member.state.head, message))

    def notify_progress(self, _: int) -> None:
        """Fire the stream's ticker."""
        self._stream.progress_tick()

    def cancel_with(self, watch_id: int, reason: str) -> None:
        """Cancel a watch from the server's side, as a server may for its own reasons."""
        watcher = self._stream._watchers.pop(watch_id, None)
        if watcher is not None:
            state = self.member.state
            state.watchable.remove(watcher)
            message = self.member.modules.watch_batch.WatchMessage(
                watch_id, state.mvcc.revision, canceled=True, cancel_reason=reason
            )
            self._stream.queue_control(message)

    def close(self) -> None:
        """End the call: its watchers are gone."""
        self._stream.close()
        self.requests.clear()
        self.out.clear()


def make_member(
    config: Config, parts: Parts, store: Store, permissions: Permissions, place: int
) -> Member | StoreMember:
    """Return a member of the etcd of a world: the last ones are the bundled store, the first ones old servers."""
    member_id = 0xE0 + place
    revisions_max = config.batch_revisions_max
    if place >= max(config.members - config.bundled, config.old_members):
        return StoreMember(parts.store, store, member_id, permissions, revisions_max, config.store_fragment_bytes)
    return Member(store, member_id, revisions_max, place >= config.old_members)
