"""Deliberate bugs in the core that the simulator must find, each of a realistic kind."""

from __future__ import annotations

from tests.sim.mutant_table_covers import COVER_MUTANTS
from tests.sim.mutant_table_engine import ENGINE_MUTANTS
from tests.sim.mutant_table_groups import GROUP_MUTANTS
from tests.sim.mutant_table_parts import PARTS_MUTANTS
from tests.sim.mutant_table_upstream import CLIENT_MUTANTS, STORE_MUTANTS
from tests.sim.mutants import Mutant

CORE_MUTANTS: tuple[Mutant, ...] = (
    # The position of a source.
    Mutant(
        "a source moves one revision too little",
        "fanout",
        "source.next_revision = batch.last_revision + 1",
        "source.next_revision = batch.last_revision",
    ),
    Mutant("what is old is delivered again", "fanout", "part = batch.since(source.next_revision)", "part = batch"),
    Mutant(
        "an event's header counts as progress", "core", "elif not response.created and not response.events:", "else:"
    ),
    Mutant(
        "a future watch gets the batch before its start",
        "fanout",
        "self._meet(source, first_revision)",
        "self._meet(source, batch.last_revision)",
    ),
    Mutant(
        "a watch from now gets what came before it",
        "fanout",
        "            if group.newest > first_revision:",
        "            if False:",
    ),
    Mutant(
        "a watch from now that leaves its group forgets where it begins",
        "fanout",
        "watch.position = max(watch.position, source.next_revision if group.behind is None else group.behind)",
        "watch.position = source.next_revision if group.behind is None else group.behind",
    ),
    # Histories and replays.
    Mutant(
        "a replay begins one batch too late",
        "history",
        "return self._batches[bisect_left(self._lasts, position, self._gone) :]",
        "return self._batches[bisect_left(self._lasts, position, self._gone) + 1 :]",
    ),
    Mutant(
        "the floor stays below what was evicted",
        "history",
        "self.floor = batch.last_revision + 1",
        "self.floor = batch.last_revision",
    ),
    Mutant(
        "a replay repeats the revision it was cut at",
        "history",
        "following = revision[0].revision",
        "following = chosen[-1].revision",
    ),
    Mutant(
        "a replay skips the revision it was cut at",
        "history",
        "following = revision[0].revision",
        "following = revision[0].revision + 1",
    ),
    Mutant(
        "inputs between two rings look at as much as they like",
        "replay",
        "if budget <= 0 or self.left_events <= 0:",
        "if budget <= 0:",
    ),
    Mutant(
        "a watch below the floor is served",
        "model",
        "return position >= self.history.floor",
        "return position >= self.history.floor - 1",
    ),
    Mutant(
        "what was handed back is lost",
        "replay",
        "watch.position = min(watch.position, payload.first_revision)",
        "watch.position = max(watch.position, payload.first_revision)",
    ),
    Mutant("a drained session stays stalled", "replay", "        session.stalled = False\n", "        pass\n"),
    # Joining.
    Mutant(
        "now includes what was there",
        "joining",
        "header, position = create.header.at(now), now + 1",
        "header, position = create.header.at(now), now",
    ),
    Mutant(
        "a read in flight serves later creates",
        "revision_reads",
        "self.later.waiting[create] = None",
        "self.current.waiting[create] = None",
    ),
    Mutant(
        "a trunk from now counts a part of a revision as whole",
        "trunk",
        "trunk.start_over(header.revision + 1)",
        "trunk.start_over(header.revision)",
    ),
    Mutant(
        "an id is free while its watch waits to be cancelled",
        "model",
        "while self.id_taken(self.next_id):",
        "while self.next_id in self.watches:",
    ),
    # Variants.
    Mutant(
        "prev_kv for all watches",
        "batch",
        "encoded = event.encoded if variant & PREV_KV or not has_prev_kv else event.bare",
        "encoded = event.encoded",
    ),
    Mutant(
        "a filter lets deletes through",
        "batch",
        "variant & NO_DELETE and event.kind == DELETE",
        "variant & NO_DELETE and event.kind == PUT",
    ),
    Mutant(
        "joined responses carry a later header",
        "batch",
        "header = self._header.at(events[-1].revision)",
        "header = self._header",
    ),
    Mutant(
        "prev_kv is promised from the beginning", "placement", "prev_kv_from = trunk.next_revision", "prev_kv_from = 0"
    ),
    # Compaction and cancels.
    Mutant(
        "a compaction cancels who has missed nothing",
        "losing",
        "if watch.next_revision < end.reason and",
        "if watch.next_revision <= end.reason and",
    ),
    Mutant("a compacted id is free at once", "ending", "session.compacted.add(watch.watch_id)", "pass"),
    # Progress.
    Mutant("progress goes back", "waiting", "if following <= known:", "if False:"),
    Mutant(
        "progress for who is behind",
        "waiting",
        "or watch.source is not trunk or session.stalled",
        "",
    ),
    Mutant(
        "progress is asked for once only",
        "progress_requests",
        "self._pause_s = min(self._pause_s * 2, state.limits.progress_retry_s_max)",
        "self._pause_s = 1e9",
    ),
    Mutant(
        "a late answer is one to the newest request",
        "progress",
        "self._waiters.learn(number, header.revision)",
        "self._waiters.learn(self._state.progress_serial, header.revision)",
    ),
    Mutant(
        "a notification of etcd is kept back", "notifying", "if trunk.notices is not None and not trunk.opening", "if 0"
    ),
    Mutant("a watch is notified before its start", "notifying", "and watch.progress_floor < trunk.next_revision", ""),
    # Work that takes several steps.
    Mutant("a round ends with a full step", "notifying", "if len(watches) < left:", "if len(watches) <= left:"),
    Mutant(
        "the rest of a round waits",
        "notifying",
        "return self._state.now if self._rounds or self._proven else self._state.notices.next_deadline()",
        "return self._state.notices.next_deadline()",
    ),
    Mutant(
        "the watches of an ended session stay",
        "core",
        "or state.leaving or self._reads.answered",
        "or self._reads.answered",
    ),
    # Histories that are kept without an upstream watch.
    Mutant(
        "a kept history goes on too late",
        "trunk",
        "state.open_upstream(trunk, position, trunk.prev_kv_from is not None, False)",
        "state.open_upstream(trunk, position + 1, trunk.prev_kv_from is not None, False)",
    ),
    Mutant(
        "the end of a run wakes no watch", "state", "for session in run.sessions: self.want_replay(session)", "pass"
    ),
    Mutant(
        "a stream that owes an answer is never asked again",
        "progress_requests",
        "if upstream.asked_at is not None and upstream.asked_at + self._retry_s > self._now:",
        "if upstream.asked_at is not None:",
    ),
    # Leaks.
    Mutant("a backfill stays open", "placement", "if not source.watches and not source.upstream.closed", "if False"),
    Mutant(
        "a trunk lingers for ever", "trunk", "state.lingers.start(trunk, state.now + state.limits.linger_s)", "pass"
    ),
    # Waiting, and its causes.
    Mutant(
        "the timer does not go on with the queue",
        "placement",
        "self.left = self._state.limits.step_watches_max",
        "pass",
    ),
    Mutant(
        "a queued watch is forgotten when its range goes to the end of the queue",
        "placement",
        "state.queued[range_] = state.queued.pop(range_)",
        "state.queued.pop(range_)",
    ),
    Mutant("a stalled session gets progress", "model", " or self.session.stalled", ""),
    Mutant("a stall is not heard", "core", "self._replayer.stalled(session)", "pass"),
    Mutant("a watch joins a trunk that is not there", "joining", "if not trunk.opening:", "if True:"),
    Mutant(
        "one read serves for ever", "revision_reads", "self.current, self.later = self.later, None", "self.later = None"
    ),
    Mutant(
        "no session is too far behind",
        "ending",
        'self.end(session, Status.UNAVAILABLE, f"watchmux: the client has been behind for more than {limit:g} s")',
        "return",
    ),
    Mutant(
        "no session learns that there is no leader",
        "ending",
        "self.end(session, Status.UNAVAILABLE, text)",
        "pass",
    ),
    Mutant("one refused token ends all", "losing", "elif next(upstream.tokens(), None) is not None:", "elif False:"),
    # Bugs that only a limit or a clock shows.
    Mutant(
        "fragments are not cut",
        "batch",
        "payload.event_count > 1 and payload.size",
        "payload.event_count > 99 and payload.size",
    ),
    Mutant(
        "the limit of a stream is off by one",
        "joining",
        "len(session.compacted or ()) >= limits.watches_per_session_max",
        "len(session.compacted or ()) > limits.watches_per_session_max",
    ),
    Mutant("bookmarks grow old", "progress", "if trunk.proven_at <= old", "if False"),
    Mutant(
        "a restored store is not believed",
        "losing",
        "self._cancellation.cancel_compacted(watch, header.revision, header)",
        "pass",
    ),
)

MUTANTS = (
    *(*CORE_MUTANTS, *COVER_MUTANTS, *CLIENT_MUTANTS, *STORE_MUTANTS),
    *(*ENGINE_MUTANTS, *PARTS_MUTANTS, *GROUP_MUTANTS),
)
