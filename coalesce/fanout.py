"""The fan-out: a batch of a source goes to the watches that follow it, at a cost of O(1) per variant for the core.

A watch in a group is *in step*: it needs what the source brings next. So nothing is compared per watch: the batch goes
to the whole group, as one cached tuple.

A watch that needs nothing before a later revision waits *ahead* and joins its group when the source reaches that
revision; if this happens inside a batch, the watch gets its own part of the batch. But a watch that begins at "now" is
put in step at once, although its source may not be proven so far: events before "now" nearly never follow. The group
knows the highest position of its watches; if a batch begins below it, the watches concerned are put ahead then.

A session with very many watches on a trunk has groups of its own, each with a bounded number of them. A batch only
leaves such a group *behind*, at a cost of O(1): the group keeps the first revision that it still needs, and is replayed
in the turns of its session (see `replay`). So neither an event for all these watches nor a stall of their session is
one long step.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from coalesce.ahead import AheadWatches
from coalesce.batch import FRAGMENT, Batch, Payload, Variants, payload_of_one
from coalesce.cover import Cover
from coalesce.effects import Deliver
from coalesce.model import Group, Session, Source, Watch
from coalesce.place import Place
from coalesce.ranges import CoverBranch
from coalesce.state import CoreState
from proto.event_key import event_key
from proto.scan import Event
from proto.spans import is_in

SHARED_WATCHES_MAX: Final = 3_000
"""Maximum watches of a session in a group that it shares with others: a stall returns all in one step, 2 us each."""

OWN_GROUP_WATCHES_MAX: Final = 1_000
"""Maximum watches of an own group: it is replayed in one step, and a stall may return all of it."""


class Fanout:
    """Moves sources forward, and the watches that follow them."""

    def __init__(self, state: CoreState) -> None:
        self._state = state

    def ingest(self, source: Source, batch: Batch) -> None:
        """Send the new part of a batch to the watches that need it, advance past it, and keep it in the history."""
        state = self._state
        source.proof = state.progress_serial
        source.proven_at = state.now
        first_revision = batch.first_revision
        if first_revision < source.next_revision:
            part = batch.since(source.next_revision)
            if part is None:
                return
            batch, first_revision = part, part.first_revision
        ahead = source.ahead
        if ahead is not None and ahead.first <= first_revision:
            # There are no events between next_revision and the batch, so watches with a position there are in step.
            self._meet(source, first_revision)
        history = source.history
        if type(source) is Cover:
            self._spread(source, batch)
        has_prev_kv = history.has_prev_kv
        variants: Variants | None = None
        if len(batch.events) > 1 or len(source.groups) > 1:
            variants = Variants(batch.header, batch.events, state.limits.fragment_bytes, has_prev_kv)
        stats = state.stats
        for group in tuple(source.groups.values()):
            if group.newest > first_revision:
                self._hold_back(group, first_revision)
            if group.session is not None:
                self._leave_behind(group, group.session, first_revision)
                continue
            count = len(group.members)
            if count:
                variant = group.variant
                # One event for one group is the common case.
                payload = payload_of_one(batch, variant, has_prev_kv) if variants is None else variants.payload(variant)
                if payload is not None:
                    group.sent_revision = payload.header.revision
                    state.effects.append(Deliver(payload, group.listed or state.lists.of(group)))
                    stats.delivered += count
                    stats.delivered_events += count * payload.event_count
        source.next_revision = batch.last_revision + 1
        if source.ahead is not None:
            self._deliver_parts(source, batch)
            self._meet(source, source.next_revision)
        history.append(batch, state.now)

    def _spread(self, cover: Cover, batch: Batch) -> None:
        """Send each branch of a cover the events of its keys."""
        has_prev_kv, events, find = cover.history.has_prev_kv, batch.events, cover.index.find
        stats = cover.stats
        stats.events += len(events)
        stats.bytes += batch.size
        parts: dict[CoverBranch[Group], list[Event]] = {}
        for event in events:
            branches = find(event_key(event.encoded))
            if not branches:
                stats.unwanted_events += 1
                stats.unwanted_bytes += len(event.encoded)
            for branch in branches:
                if branch.groups:
                    parts.setdefault(branch, []).append(event)
        for branch, part in parts.items():
            for group in tuple(branch.groups.values()):
                if group.newest > batch.first_revision:
                    self._hold_back(group, batch.first_revision)
            variants = Variants(batch.header, part, self._state.limits.fragment_bytes, has_prev_kv)
            for group in branch.groups.values():
                if group.session is not None:
                    self._leave_behind(group, group.session, batch.first_revision)
                else:
                    self._send(group, variants.payload(group.variant))

    def _send(self, group: Group, payload: Payload | None) -> None:
        """Send a payload, if the filters leave one, to a group of a branch."""
        if payload is not None:
            group.sent_revision = payload.last_revision
            watches = self._state.lists.of(group)
            self._state.effects.append(Deliver(payload, watches))
            self._state.stats.delivered += len(watches)
            self._state.stats.delivered_events += len(watches) * payload.event_count

    def _leave_behind(self, group: Group, session: Session, revision: int) -> None:
        """Let an own group be replayed from `revision` on, where a batch begins."""
        if group.behind is None and group.members:
            group.behind = revision
            session.groups_behind[group] = None
            self._state.stats.lagging += len(group.members)
            self._state.note_behind(session)
            self._state.want_replay(session)

    def catch_up(self, group: Group, session: Session) -> None:
        """Let an own group follow its source again."""
        group.behind = None
        del session.groups_behind[group]
        self._state.stats.lagging -= len(group.members)
        self._state.note_behind(session)

    def advance(self, source: Source, revision: int) -> None:
        """Record that everything through `revision` has been delivered: there are no further events."""
        source.proof = self._state.progress_serial
        source.proven_at = self._state.now
        if revision >= source.next_revision:
            source.next_revision = revision + 1
            if source.ahead is not None:
                self._meet(source, revision + 1)

    def add(self, watch: Watch) -> None:
        """Let an unplaced watch follow its source; its position is the source's next_revision or later."""
        source, position, header = watch.source, watch.position, self._state.header
        assert source is not None, "the watch has a source"
        if position <= source.next_revision:
            self._step(source, watch)
        elif header is not None and position <= header.revision + 1:
            group = self._step(source, watch)
            if position > group.newest:
                group.newest = position
        else:
            self._wait(source, watch)

    def _wait(self, source: Source, watch: Watch) -> None:
        """Put an unplaced watch ahead."""
        watch.place = Place.AHEAD
        if source.ahead is None:
            source.ahead = AheadWatches()
        source.ahead.add(watch, watch.position)

    def _hold_back(self, group: Group, revision: int) -> None:
        """Put the watches of a group ahead whose position is above `revision`, where the next batch begins."""
        group.newest = 0
        for watch in [watch for watch in group.members if watch.position > revision]:
            assert watch.source is not None, "in step"
            self.remove(watch)
            self._wait(watch.source, watch)

    def remove(self, watch: Watch) -> None:
        """Remove a watch that is in step or ahead, and record its position."""
        source, group = watch.source, watch.group
        assert source is not None, "the watch follows a source"
        if group is None:
            assert source.ahead is not None, "in step or ahead"
            source.ahead.remove(watch, watch.position)
            self._drop_empty(source)
            return
        group.remove(watch)
        if not group.members:
            self._state.lists.forget(group)
            if watch.branch is not None or group.session is not None:
                del source.groups_of(watch)[group.key]
        watch.position = max(watch.position, source.next_revision if group.behind is None else group.behind)
        watch.group = None
        if group.behind is not None:
            self._state.stats.lagging -= 1
            if not group.members:
                del watch.session.groups_behind[group]
                self._state.note_behind(watch.session)
        watch.sent_revision = max(watch.sent_revision, group.sent_revision)

    def _deliver_parts(self, source: Source, batch: Batch) -> None:
        """Send watches whose position lies inside the batch the part of it from there on."""
        state = self._state
        variants: Variants | None = None
        position = 0
        for watch in self._arrived(source, batch.last_revision):
            if variants is None or watch.position != position or source.is_cover:
                position = watch.position
                part = batch.since(position)
                assert part is not None, "the position lies inside the batch"
                events = part.events
                if source.is_cover and watch.branch is not None:
                    span = watch.branch.span
                    events = [event for event in events if is_in(event_key(event.encoded), span)]
                variants = Variants(part.header, events, state.limits.fragment_bytes, source.history.has_prev_kv)
            payload = variants.payload(watch.variant)
            if payload is not None:
                watch.sent_revision = payload.last_revision
                state.effects.append(Deliver(payload, (watch,)))
                state.stats.delivered += 1
                state.stats.delivered_events += payload.event_count
            self._step(source, watch)

    def _meet(self, source: Source, revision: int) -> None:
        """Put the watches in step whose position is `revision` at most; there are no events before `revision`."""
        for watch in self._arrived(source, revision):
            self._step(source, watch)

    def _arrived(self, source: Source, revision: int) -> Iterator[Watch]:
        """Take the watches ahead whose position is `revision` at most, in the order of positions."""
        while source.ahead is not None and source.ahead.first <= revision:
            arrived = source.ahead.take_first()
            self._drop_empty(source)
            yield from arrived

    def _drop_empty(self, source: Source) -> None:
        """No watch is ahead any more, if the last one was taken."""
        if not source.ahead:
            source.ahead = None

    def _step(self, source: Source, watch: Watch) -> Group:
        groups = source.groups_of(watch)
        group = groups.get(watch.variant)
        if group is None:
            group = groups[watch.variant] = Group(watch.variant)
        elif (
            len(group.members) >= SHARED_WATCHES_MAX
            and len(watch.session.watches) > SHARED_WATCHES_MAX
            # A backfill has few watches, and a run holds back those with fragment one by one.
            and source is watch.trunk
            and not watch.variant & FRAGMENT
            and ((watch.variant, watch.session) in groups or _is_one_of_many(watch))
        ):
            group = _own_group(groups, watch)
        group.add(watch)
        watch.group = group
        watch.place = Place.IN_STEP
        return group


def _is_one_of_many(watch: Watch) -> bool:
    """Whether others of the newest watches of its session have the same range."""
    newest = islice(reversed(watch.session.watches.values()), 8)
    return any(other.trunk is watch.trunk and other.branch is watch.branch and other is not watch for other in newest)


def _own_group(groups: dict[object, Group], watch: Watch) -> Group:
    """Return the own group that a watch joins: the newest one of its session, or a further one."""
    session = watch.session
    group = groups.get((watch.variant, session))
    if group is not None:
        if group.behind is None and len(group.members) < OWN_GROUP_WATCHES_MAX:
            return group
        # Full, or behind: it stays under another key.
        group.key = id(group)
        groups[group.key] = group
    own = Group(watch.variant, session)
    groups[own.key] = own
    return own
