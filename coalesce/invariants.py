"""The invariants that hold between any two inputs, by number; `check` recounts all of them after each test step.

 1. A session's watches are those registered with it: each under its own id, with its session's outlet, known to its
    trunk, and the trunk is that of its range. An id that waits for its cancel after a compaction is not a watch's id.
 2. A watch is in exactly one place: in a group of its source, ahead of its source, in its session's `lagging`,
    or queued for a backfill. The others hold no such watch.
 3. A watch in step needs what its source needs next, or begins later, at its group's `newest` at most; one ahead
    begins later.
 4. A group holds watches of its variant only; a watch that wants prev_kv follows only a source that has it.
 5. A watch comes through its trunk, unless that is still to start at "now", or a backfill of its trunk; the backfill
    knows it.
 6. A stalled session counts as behind and is not replayed. Its watches may stay in step or ahead: the shell returns
    the events for them, and the first ones returned make a watch lag.
 7. A lagging watch of a session that is not stalled is replayed without a further input from the shell.
 8. A history is ordered and disjoint, lies within [floor, next_revision), and its byte count is correct.
 9. Each history, and all of them together, stay within their bounds; and so do the lists of groups.
10. A backfill has watches or is an upgrade; no more are open than allowed; no watch is queued while one may be opened,
    except those that wait for the next timer; and a backfill is paused only while all its watches lag.
11. A trunk without watches and without creates that wait for it lingers; any other does not.
12. One upstream watch is open at etcd per trunk and per backfill, except those that end, and each of them knows its
    source. It starts at "now" or at a revision, never at 0.
13. The head of a session's queue waits for something that is under way: a check, a read, a trunk's `created` or end, or
    the next timer. A queue marked full is longer than the size at which it is released.
14. A queued read exists only while another one is in flight, and no create waits for a read that is not scheduled.
15. Reported progress is true: no event below the progress that a watch was sent is still to come for it.
16. A session that waits for progress has watches, and the timer is set; a blocked session is listed under the trunk
    that blocks it, and the sessions that are to be checked in a later step wait.
17. The gauges equal a recount.
18. Nothing that has ended is listed anywhere, except watches of sessions that have just ended, which the timer removes.
19. Between two timers no more events of the histories are examined than allowed, except for one session's share.
20. A trunk's notices list those of its watches that asked for progress_notify, and while there are any a timer is set.
21. A parked trunk has neither watches nor creates nor an upstream watch, and its range has no other trunk.
22. A watch that waits for the end of a run is known to it, and the run's source exists; the events it needs next are
    not evicted before they are sent.
23. Each input passes on all that its parts recorded for parts above them.
24. The branches of a cover are the ranges of its watches, and lie within its prefix. A cover keeps its prev_kv: a watch
    that wants prev_kv is on a cover that has it.
"""

from __future__ import annotations

from itertools import chain

from coalesce.core import Coalescer
from coalesce.cover import Cover
from coalesce.listing import LISTED_WATCHES_MAX
from coalesce.model import Backfill, Group, PendingCreate, Session, Source, Trunk, Watch
from coalesce.place import Place
from coalesce.placement import Placement
from coalesce.progress import Progress
from coalesce.ranges import CoverBranch, TrunkName, contains
from coalesce.replay import WATCH_EVENTS
from coalesce.revision_reads import RevisionReads
from coalesce.state import CoreState
from coalesce.waiting import ProgressWaiters


class InvariantBroken(AssertionError):
    """An invariant does not hold: a bug in the core."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"invariant {number}: {text}")
        # Its number in the module's docstring.
        self.number = number


def check(core: Coalescer) -> None:
    """Recount every invariant. For tests: it walks everything. Raises InvariantBroken."""
    state = core._state
    waiting = state.to_advance or state.to_replay
    _need(23, not waiting, "work of one input is left for the next one")
    for session in state.sessions:
        _check_session(state, session)
        _check_progress(session, core._waiters, core._progress)
        for watch in session.watches.values():
            _check_watch(state, watch)
    _need(18, all(session in state.sessions for session in state.lagging_sessions), "an ended session is behind")
    for session in state.leaving:
        _need(
            18,
            session.ended and session not in state.sessions and session.queue is None,
            "a leaving session is not ended",
        )
        for watch in session.watches.values():
            _check_watch(state, watch)
    for trunk in state.trunks.values():
        _check_trunk(state, trunk)
    for name, trunk in state.parked.items():
        _check_parked(state, name, trunk)
    _check_backfills(state, core._placement)
    _check_upstreams(state)
    _check_reads(state, core._reads)
    _check_gauges(state)
    share = 2 * state.limits.replay_events_max + WATCH_EVENTS
    _need(19, core._replayer.left_events > -share, "a turn of replaying exceeded its share")


def _sources(state: CoreState) -> list[Source]:
    return [*state.trunks.values(), *state.backfills]


def _need(number: int, holds: bool, text: object) -> None:
    if not holds:
        raise InvariantBroken(number, str(text))


def _check_session(state: CoreState, session: Session) -> None:
    _need(18, not session.ended, "an ended session is listed")
    for watch_id, watch in session.watches.items():
        _need(1, watch.watch_id == watch_id and watch.session is session and watch.outlet is session.outlet, watch)
        _need(1, session.compacted is None or watch_id not in session.compacted, watch)
    for watch in session.lagging:
        _need(2, watch.place is Place.LAGGING and session.watches.get(watch.watch_id) is watch, watch)
    for group in session.groups_behind:
        _need(3, group.session is session and group.behind is not None and bool(group.members), "a group behind")
    behind = session.stalled or session.has_lagging
    _need(6, (session.lagging_since is not None) == behind, "lagging since")
    _need(6, (session in state.lagging_sessions) == behind, "lagging sessions")
    _need(6, not session.stalled or session not in state.to_replay_later, "a turn of a stalled session")
    waits = not session.groups_behind and all(watch.awaits_run for watch in session.lagging)
    if not session.stalled and not waits:
        _need(7, session in state.to_replay_later, "lagging watches of a session that is not due")
    if session.queue is not None:
        _need(13, bool(session.queue), "an empty queue")
        _check_head(state, session)
    _need(
        13,
        not session.line_full or session.line_bytes > state.limits.line_bytes_max // 2,
        "a short queue is marked full",
    )


def _check_progress(session: Session, waiters: ProgressWaiters, progress: Progress) -> None:
    if session.progress_needs:
        _need(16, bool(session.watches) and session in waiters.sessions, "waits for progress")
        _need(16, progress.next_deadline() is not None, "no timer for a session that waits for progress")
    if session.progress_blocker is not None:
        _need(16, waiters.is_listed(session), "a blocked session is not listed under its trunk")
    _need(16, session in waiters.sessions or session not in waiters.to_check, "a session that does not wait is checked")


def _check_head(state: CoreState, session: Session) -> None:
    assert session.queue is not None, "the caller has checked"
    head = session.queue[0]
    if session in state.to_advance_later or head in state.to_prepare:
        return
    _need(13, isinstance(head, PendingCreate), "only creates wait")
    assert isinstance(head, PendingCreate), "checked above"
    waits_for_check = not head.checked and head.refusal is None
    trunk, prev_kv = head.trunk, head.request.prev_kv
    waits_for_trunk = trunk is not None and (not trunk.is_live or state.is_ending(trunk, prev_kv))
    _need(13, waits_for_check or head.reading or waits_for_trunk, head.request)
    for create in session.queue:
        if isinstance(create, PendingCreate) and create.trunk is not None:
            _need(13, create in create.trunk.joining, "a create is not registered with its trunk")


def _check_watch(state: CoreState, watch: Watch) -> None:
    trunk, source, session = watch.trunk, watch.source, watch.session
    _need(1, watch in trunk.watches and state.trunks.get(trunk.name) is trunk, watch)
    _need(24, (watch.branch is not None) == isinstance(trunk, Cover), "a watch has a branch only below a cover")
    place = watch.place
    # It is in its place, and nowhere else.
    _need(2, (watch.group is not None and watch in watch.group.members) == (place is Place.IN_STEP), watch)
    ahead = None if source is None or source.ahead is None else source.ahead.by_position
    _need(2, (ahead is not None and watch in ahead.get(watch.position, ())) == (place is Place.AHEAD), watch)
    _need(2, (watch in session.lagging) == (place is Place.LAGGING), watch)
    _need(2, (watch in state.queued.get(watch.branch or trunk, ())) == (place is Place.QUEUED), watch)
    _need(2, place is not Place.ENDED, watch)
    if place is Place.IN_STEP:
        assert watch.group is not None, "checked above"
        _need(2, source is not None and source.groups_of(watch).get(watch.group.key) is watch.group, watch)
        _need(4, watch.group.variant == watch.variant, watch)
    if place is Place.AHEAD:
        _need(3, source is not None and watch.position > source.next_revision, watch)
    if source is not None:
        _need(5, source is trunk or (isinstance(source, Backfill) and watch in source.watches), watch)
        _need(5, source is trunk or (isinstance(source, Backfill) and source.trunk is trunk), watch)
        _need(5, source is not trunk or not trunk.opening or trunk.upstream.start_revision is not None, watch)
        has_prev_kv = source.history.has_prev_kv and (source is not trunk or trunk.prev_kv_from is not None)
        _need(4, not watch.wants_prev_kv or has_prev_kv or place is Place.LAGGING, watch)
    _need(15, watch.progress_floor <= watch.next_revision, watch)


def _check_source(state: CoreState, source: Source) -> None:
    history = source.history
    batches = history.batches()
    last = history.floor - 1
    for batch in batches:
        _need(8, last < batch.first_revision <= batch.last_revision, batch)
        _need(8, batch.history is history, "a history holds a batch that it has evicted")
        last = batch.last_revision
    _need(8, last < source.next_revision or not batches, "a history reaches beyond next_revision")
    _need(8, history.bytes == sum(batch.memory_bytes for batch in batches), "byte count of a history")
    _need(9, history.bytes <= state.limits.history_bytes_max, "a history is too large")
    _need(9, len(history) <= state.limits.history_revisions_max, "a history is too long")
    if isinstance(source, Cover):
        _need(9, source.keyed.index_bytes <= source.keyed.index_bytes_max, "the index of a cover is too large")
    of_branches = [branch.groups for branch in source.index.values()] if isinstance(source, Cover) else []
    for key, group in chain.from_iterable(groups.items() for groups in (source.groups, *of_branches)):
        _need(4, group.key == key and (group.session is not None or group.variant == key), "a group in the wrong place")
        reached = source.next_revision
        if group.behind is not None:
            _need(3, group.session is not None and group in group.session.groups_behind, "a group behind is not listed")
            _need(3, group.behind < reached, "a group behind that is not")
            reached = group.behind
        for watch in group.members:
            _need(2, watch.group is group and watch.source is source and watch.place is Place.IN_STEP, watch)
            _need(2, group.session is None or watch.session is group.session, watch)
            _need(3, watch.next_revision == max(reached, watch.position), watch)
            _need(3, watch.position <= max(reached, group.newest), watch)
        _need(2, group.listed is None or tuple(group.members) == group.listed, "the list of a group is stale")
        _need(9, group.listed is None or group in state.lists.sizes, "the list of a group does not count")
    ahead = source.ahead
    _need(2, (ahead is not None) == bool(ahead), "no watch is ahead")
    for position, alike in {}.items() if ahead is None else ahead.by_position.items():
        _need(2, bool(alike) and ahead is not None and position >= ahead.first, "a position without watches")
        for watch in alike:
            _need(2, watch.place is Place.AHEAD and watch.source is source and watch.position == position, watch)


def _check_trunk(state: CoreState, trunk: Trunk) -> None:
    _check_source(state, trunk)
    for watch in trunk.watches:
        _need(18, watch.place is not Place.ENDED, watch)
        _need(18, watch.session in state.sessions or watch.session in state.leaving, watch)
        _need(1, watch.session.watches.get(watch.watch_id) is watch, watch)
    for create in trunk.joining:
        _need(18, not create.session.ended and create.trunk is trunk, "an ended create holds a trunk")
    asked = {watch for watch in trunk.watches if watch.progress_notify}
    notices = trunk.notices
    listed = {watch for alike in notices.watches.values() for watch in alike} if notices is not None else set()
    _need(20, asked == listed and (notices is not None) == bool(asked), "the watches that asked for progress_notify")
    _need(20, notices is None or notices.timer_at is not None, "no timer for progress_notify")
    _need(11, trunk.is_used == (trunk.timer_at is None), "a trunk lingers if and only if it is unused")
    if isinstance(trunk, Cover):
        _check_cover(trunk)


def _check_cover(cover: Cover) -> None:
    branches: dict[CoverBranch[Group], int] = {}
    for watch in cover.watches:
        branch = watch.branch
        assert branch is not None, "checked with the watch"
        branches[branch] = branches.get(branch, 0) + 1
    _need(24, set(cover.index.values()) == set(branches), "the branches of a cover are those of its watches")
    for branch, watches in branches.items():
        _need(24, branch.watches == watches and cover.index.get(branch.span) is branch, "a branch's watches")
        _need(24, contains(cover.prefix, *branch.span), "a branch lies outside of its cover")
    _need(24, not cover.groups and cover.upgrade is None, "a cover has groups or an upgrade")
    _need(24, (cover.prev_kv_from is not None) == cover.prev_kv, "a cover has changed its prev_kv")
    _need(24, not cover.prev_kv_watches or cover.prev_kv, "a watch with prev_kv is on a cover without")


def _check_parked(state: CoreState, name: TrunkName, trunk: Trunk) -> None:
    _check_source(state, trunk)
    _need(21, name == trunk.name and name not in state.trunks, "a range has two trunks")
    _need(21, not trunk.watches and not trunk.joining and not trunk.backfills, "a parked trunk is in use")
    _need(21, trunk.upstream.closed and trunk.upstream.source is None, "a parked trunk has an upstream watch")
    _need(21, trunk.upgrade is None and trunk.notices is None and trunk.timer_at is None, "a parked trunk is in use")


def _check_backfills(state: CoreState, placement: Placement) -> None:
    listed = [backfill for trunk in state.trunks.values() for backfill in trunk.backfills]
    upgrades = [trunk.upgrade for trunk in state.trunks.values() if trunk.upgrade is not None]
    _need(10, set(state.backfills) == {*listed, *upgrades}, "open backfills")
    _need(10, len(listed) <= state.limits.backfills_max, "too many backfills")
    _need(
        10,
        not state.queued or len(listed) == state.limits.backfills_max or placement.is_due or bool(state.restored),
        "a watch is queued though a backfill may be opened",
    )
    for backfill in state.backfills:
        _check_source(state, backfill)
        needed = backfill.watches or backfill.is_upgrade or backfill in state.ending
        _need(10, bool(needed), "a backfill without watches")
        for watch in backfill.watches:
            _need(5, watch.source is backfill, watch)
        _need(10, not backfill.paused or not backfill.is_followed, "a backfill is paused though a watch follows it")
    for range_, watches in state.queued.items():
        _need(2, bool(watches), "a range without queued watches is listed")
        for watch in watches:
            _need(
                2,
                watch.place is Place.QUEUED and watch.source is None and range_ is (watch.branch or watch.trunk),
                watch,
            )
            _need(2, watch.session.watches.get(watch.watch_id) is watch, watch)


def _check_upstreams(state: CoreState) -> None:
    # A cover that etcd has refused stays until its watches have moved.
    ended: set[Source] = {
        trunk for trunk in state.to_move if isinstance(trunk, Cover) and trunk.retired and trunk.upstream.closed
    }
    for source in state.ending:
        _need(12, source.upstream.closed and source in {*_sources(state)}, "a source that ends")
        ended.add(source)
    for source in _sources(state):
        if source.trunk in state.restoring and source.upstream.closed:
            ended.add(source)
    expected = {source.upstream for source in _sources(state) if source not in ended}
    _need(12, set(state.upstreams) == expected, "open upstream watches")
    for source, run in state.runs.items():
        _need(22, source in {*_sources(state)} and source.run is run, "a run of a source that has ended")
        for session in state.lagging_sessions:
            waiting = [watch for watch in session.lagging if watch.source is source and watch.awaits_run]
            if session.stalled or session in state.to_replay_later or not waiting:
                continue
            _need(22, session in run.sessions, "a watch is not registered with the run it waits for")
            hook = source.history.eviction_hook
            first = min(watch.position for watch in waiting)
            guarded = hook is not None and first >= hook.first_revision
            _need(22, guarded, "events that a watch waits for may be evicted")
    _need(12, expected.issuperset(state.to_ask), "a closed upstream watch is to be asked for progress")
    for source in _sources(state):
        if source not in ended:
            _need(12, source.upstream.owner is source and not source.upstream.closed, source.upstream)
            # For etcd, 0 would be "now".
            _need(12, source.upstream.start_revision != 0, source.upstream)


def _check_reads(state: CoreState, reads: RevisionReads) -> None:
    current, later = reads.current, reads.later
    _need(14, current is not None or later is None, "a queued read without one in flight")
    waiting = {id(create) for read in (current, later) if read is not None for create in read.waiting}
    waiting |= {id(create) for create, _ in reads.answered}
    for session in state.sessions:
        for create in session.queue or ():
            if isinstance(create, PendingCreate):
                _need(
                    14,
                    create.reading == (id(create) in waiting),
                    "a create's `reading` differs from the reads that exist",
                )


def _check_gauges(state: CoreState) -> None:
    stats = state.stats
    watches = ids_kept = lagging = line_bytes = history_bytes = history_batches = 0
    for session in (*state.sessions, *state.leaving):
        watches += len(session.watches)
        ids_kept += len(session.compacted or ())
        line_bytes += session.line_bytes
        _need(
            17, session.line_bytes == sum(request.bytes for request in session.queue or ()), "line_bytes of a session"
        )
        lagging += len(session.lagging) + sum(len(group.members) for group in session.groups_behind)
    histories = [source.history for source in [*_sources(state), *state.parked.values()]]
    _need(18, not {*map(id, histories)} & {*map(id, state.ledger.discarded)}, "a history in use is discarded")
    for history in [*histories, *state.ledger.discarded]:
        history_bytes += history.bytes
        history_batches += len(history)
    lists = state.lists
    _need(9, lists.watches == sum(lists.sizes.values()), "the watches in lists")
    _need(9, lists.watches <= LISTED_WATCHES_MAX or len(lists.sizes) == 1, "too many watches in lists")
    _need(17, stats.sessions == len(state.sessions), "sessions")
    _need(17, stats.watches == watches, "watches")
    _need(17, stats.ids_kept == ids_kept, "ids kept")
    _need(17, stats.parked == len(state.parked), "parked")
    _need(17, stats.trunks == len(state.trunks), "trunks")
    _need(17, stats.backfills == sum(len(trunk.backfills) for trunk in state.trunks.values()), "backfills")
    _need(17, stats.line_bytes == line_bytes, "line_bytes")
    _need(17, stats.lagging == lagging, "lagging")
    _need(17, stats.queued == sum(map(len, state.queued.values())), "queued")
    _need(17, stats.history_bytes == history_bytes, "history_bytes")
    _need(17, stats.history_batches == history_batches, "history_batches")
    _need(9, history_bytes <= state.limits.history_bytes_total_max, "all histories together are too large")
