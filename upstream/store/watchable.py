"""The watchable store: watch streams on top of the multi-version store, as in etcd's server/storage/mvcc.

A watcher is in one of three groups. **Synced**: it has all events so far, and a commit's events go straight to its
stream. **Unsynced**: it starts in the past; `sync` sends it events from the log, a bounded batch at a time, until it
has caught up. **Victim**: its stream's queue was full; its message is held for `retry_victims`, which moves it back to
one of the other groups once the message is queued. `sync` cancels a watcher whose start is compacted, but its id stays
in use until the client cancels it.

Pure: no clock and no tasks. The service calls `notify` after each commit, `sync` every SYNC_INTERVAL_S, `retry_victims`
every VICTIM_INTERVAL_S while there are victims, and `progress_tick` for each stream, and writes the messages that
`take` returns.

etcd has two channels per stream, one for control answers and one for events, and sends from either at random. This
store has one queue: `created` is sent before a watch's events, and nothing of a watch is sent after its `canceled`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

from proto.spans import FROM_KEY, Span, SpanIndex
from upstream.store import errors
from upstream.store.errors import StoreError
from upstream.store.index import RevisionRecord
from upstream.store.mvcc import Changes, Mvcc
from upstream.store.watch_batch import INVALID_WATCH_ID, EventBatch, WatchMessage

SYNC_INTERVAL_S = 0.1
VICTIM_INTERVAL_S = 0.01


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """Limits of one step and of one queue. The simulator makes them small, so that runs often reach them."""

    queue_events_max: int = 128
    """Event messages queued on a stream before its watchers become victims (etcd's chanBufLen)."""

    sync_watchers_max: int = 512
    """Watchers handled by one `sync` (etcd's maxWatchersPerSync)."""

    batch_revisions_max: int = 1000
    """Revisions in one catch-up message (etcd's watchBatchMaxRevs)."""

    batch_bytes_max: int = 1024 * 1024
    """Bytes of keys and values in one catch-up message, unless a single revision has more. etcd has no such limit, and
    its larger messages break clients that accept 4 MiB; a quarter of that leaves room for prev_kv."""

    sync_revisions_max: int = 5_000
    """Revisions of the log that one `sync` reads, so that it never blocks the store for long."""


class WatcherState(Enum):
    """The group of a watcher."""

    SYNCED = auto()
    UNSYNCED = auto()
    VICTIM = auto()
    COMPACTED = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class Watcher:
    """One watch of one stream."""

    stream: ServedStream
    watch_id: int
    span: Span
    # As requested; 0 = now.
    start_revision: int
    # The first revision still needed. Kept up to date in all groups but the synced one; there the first revision needed
    # is the larger of this and the store's next revision.
    next_revision: int
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    fragment: bool = False
    progress_notify: bool = False
    # Whether the next progress tick notifies this watcher: not if it had events since the last tick.
    progress_due: bool = False
    state: WatcherState = WatcherState.UNSYNCED

    def answer(self, batch: EventBatch, revision: int) -> WatchMessage | None:
        """Make this watcher's message of a batch; None when its filters leave no events."""
        part = batch if not (self.no_put or self.no_delete) else batch.filtered(self.no_put, self.no_delete)
        if part is None:
            return None
        return WatchMessage(self.watch_id, revision, part, self.prev_kv, self.fragment)


@dataclass(slots=True, eq=False)
class WatcherGroup:
    """Watchers by their span."""

    spans: SpanIndex[dict[Watcher, None]] = field(default_factory=SpanIndex)

    def add(self, watcher: Watcher) -> None:
        """Add a watcher that is not present."""
        watchers = self.spans.get(watcher.span)
        if watchers is None:
            self.spans.add(watcher.span, {watcher: None})
        else:
            watchers[watcher] = None

    def remove(self, watcher: Watcher) -> None:
        """Remove a watcher that is present."""
        watchers = self.spans.get(watcher.span)
        assert watchers is not None
        del watchers[watcher]
        if not watchers:
            self.spans.remove(watcher.span)


@dataclass(slots=True)
class WatchStats:
    """Counters for the metrics; the names are etcd's, without etcd_debugging_mvcc_."""

    watchers: int = 0
    streams: int = 0
    # Events in queued messages.
    pending_events: int = 0
    # Events queued on streams since the start.
    events: int = 0


class WatchableStore:
    """The watchers of a multi-version store."""

    def __init__(self, mvcc: Mvcc) -> None:
        self.mvcc = mvcc
        self.limits = WatchLimits()
        self.stats = WatchStats()
        # Called when a watcher becomes unsynced or a victim; the service then calls `sync` or `retry_victims`.
        self.on_unsynced: Callable[[], None] = lambda: None
        self.on_victim: Callable[[], None] = lambda: None
        self._synced = WatcherGroup()
        # In the order in which `sync` handles them.
        self._unsynced: dict[Watcher, None] = {}
        # Each with the message that did not fit in its stream's queue.
        self._victims: dict[Watcher, WatchMessage] = {}

    @property
    def slow_watchers(self) -> int:
        """Count the watchers that are behind (etcd_debugging_mvcc_slow_watcher_total)."""
        return len(self._unsynced) + len(self._victims)

    @property
    def unsynced(self) -> int:
        """Count the watchers that wait for `sync`."""
        return len(self._unsynced)

    @property
    def victims(self) -> int:
        """Count the watchers that wait for `retry_victims`."""
        return len(self._victims)

    def open_stream(self, on_ready: Callable[[], None] = lambda: None) -> ServedStream:
        """Open a stream; `on_ready` is called whenever its queue is no longer empty."""
        self.stats.streams += 1
        return ServedStream(self, on_ready)

    def notify(self, changes: Changes) -> None:
        """Send the changes of the revision just committed to the synced watchers."""
        if not changes:
            return
        revision = changes[0].mod_revision
        for watchers, records in self._matches(changes):
            batch = EventBatch(self.mvcc, records)
            late: list[tuple[Watcher, WatchMessage]] = []
            for watcher in watchers:
                if watcher.next_revision > revision:
                    continue
                message = watcher.answer(batch, revision)
                if message is not None and not watcher.stream.offer(watcher, message):
                    late.append((watcher, message))
            for watcher, message in late:
                self._synced.remove(watcher)
                self._add_victim(watcher, message, revision + 1)

    def _matches(self, changes: Changes) -> Iterable[tuple[dict[Watcher, None], list[RevisionRecord]]]:
        """Return the synced watchers of each range that a revision changed, with the records in the range."""
        if len(changes) == 1:
            return [(watchers, [changes[0]]) for watchers in self._synced.spans.around(changes[0].key)]
        by_group: dict[int, tuple[dict[Watcher, None], list[RevisionRecord]]] = {}
        for record in changes:
            for watchers in self._synced.spans.around(record.key):
                by_group.setdefault(id(watchers), (watchers, []))[1].append(record)
        return list(by_group.values())

    def sync(self) -> int:
        """Send a bounded number of unsynced watchers a bounded batch each; return how many are left."""
        chosen = self._choose()
        if not chosen:
            return len(self._unsynced)
        cohorts: dict[tuple[Span, int], _Cohort] = {}
        for watcher in chosen:
            place = (watcher.span, watcher.next_revision)
            cohort = cohorts.get(place)
            if cohort is None:
                cohort = cohorts[place] = _Cohort(watcher.next_revision, self.limits)
            cohort.watchers.append(watcher)
        current = self.mvcc.revision
        first = min(cohort.next_revision for cohort in cohorts.values())
        last = min(current, first + self.limits.sync_revisions_max - 1)
        self._collect(cohorts, first, last)
        for cohort in cohorts.values():
            if cohort.next_revision > last:
                continue
            batch = EventBatch(self.mvcc, cohort.records) if cohort.records else None
            upto = cohort.more_revision or last + 1
            for watcher in cohort.watchers:
                self._forward(watcher, batch, upto, current)
        return len(self._unsynced)

    def _choose(self) -> list[Watcher]:
        """Return the first unsynced watchers, after cancelling those whose next revision is compacted."""
        chosen: list[Watcher] = []
        for watcher in list(islice(self._unsynced, self.limits.sync_watchers_max)):
            if watcher.next_revision < self.mvcc.compact_revision:
                del self._unsynced[watcher]
                watcher.state = WatcherState.COMPACTED
                watcher.stream.queue_control(
                    WatchMessage(
                        watcher.watch_id,
                        self.mvcc.revision,
                        canceled=True,
                        compact_revision=self.mvcc.compact_revision,
                    )
                )
            else:
                chosen.append(watcher)
        return chosen

    def _collect(self, cohorts: dict[tuple[Span, int], _Cohort], first: int, last: int) -> None:
        """Add the events of revisions first..last to the cohorts, until their batches are full."""
        index: SpanIndex[list[_Cohort]] = SpanIndex()
        for (span, _), cohort in cohorts.items():
            if (same := index.get(span)) is None:
                index.add(span, [cohort])
            else:
                same.append(cohort)
        hungry = len(cohorts)
        # The log starts above revision 1, and there are no events below it.
        for changes in self.mvcc.changes(max(first, self.mvcc.log_floor), last):
            for record in changes:
                for same in index.around(record.key):
                    for cohort in same:
                        hungry -= cohort.add(record)
            if not hungry:
                return

    def _forward(self, watcher: Watcher, batch: EventBatch | None, upto: int, current: int) -> None:
        """Send an unsynced watcher its batch; its next revision is then `upto`."""
        del self._unsynced[watcher]
        message = watcher.answer(batch, current) if batch is not None else None
        if message is not None and not watcher.stream.offer(watcher, message):
            self._add_victim(watcher, message, upto)
            return
        watcher.next_revision = upto
        self._place(watcher)

    def retry_victims(self) -> int:
        """Try to queue the victims' messages again; return how many victims are left."""
        for watcher, message in list(self._victims.items()):
            if watcher.stream.offer(watcher, message):
                del self._victims[watcher]
                self._place(watcher)
        return len(self._victims)

    def add(self, watcher: Watcher) -> None:
        """Add a new watcher."""
        self.stats.watchers += 1
        self._place(watcher)

    def remove(self, watcher: Watcher) -> None:
        """Remove a watcher in any state."""
        if watcher.state is WatcherState.SYNCED:
            self._synced.remove(watcher)
        elif watcher.state is WatcherState.UNSYNCED:
            del self._unsynced[watcher]
        elif watcher.state is WatcherState.VICTIM:
            del self._victims[watcher]
        watcher.state = WatcherState.GONE
        self.stats.watchers -= 1

    def _place(self, watcher: Watcher) -> None:
        if watcher.next_revision > self.mvcc.revision:
            watcher.state = WatcherState.SYNCED
            self._synced.add(watcher)
        else:
            watcher.state = WatcherState.UNSYNCED
            self._unsynced[watcher] = None
            self.on_unsynced()

    def _add_victim(self, watcher: Watcher, message: WatchMessage, next_revision: int) -> None:
        watcher.state = WatcherState.VICTIM
        watcher.next_revision = next_revision
        self._victims[watcher] = message
        self.on_victim()


class _Cohort:
    """Unsynced watchers with the same range and next revision, which get the same batch."""

    __slots__ = ("_bytes", "_last", "_limits", "_revisions", "more_revision", "next_revision", "records", "watchers")

    def __init__(self, next_revision: int, limits: WatchLimits) -> None:
        self._limits = limits
        self.next_revision = next_revision
        self.watchers: list[Watcher] = []
        self.records: list[RevisionRecord] = []
        # The first revision that did not fit; 0 = all did.
        self.more_revision = 0
        self._last = 0
        self._revisions = 0
        self._bytes = 0

    def add(self, record: RevisionRecord) -> bool:
        """Add a record if it is needed and fits; revisions are never split. Return whether this filled the batch."""
        revision = record.mod_revision
        if self.more_revision or revision < self.next_revision:
            return False
        if revision != self._last:
            if self._revisions == self._limits.batch_revisions_max or self._bytes >= self._limits.batch_bytes_max:
                self.more_revision = revision
                return True
            self._revisions += 1
            self._last = revision
        self._bytes += len(record.key) + len(record.value)
        self.records.append(record)
        return False


class ServedStream:
    """One client's watches, and its queue of answers."""

    __slots__ = ("_next_id", "_on_ready", "_queue", "_store", "_watchers", "closed", "queued_controls", "queued_events")

    def __init__(self, store: WatchableStore, on_ready: Callable[[], None]) -> None:
        self._store = store
        self._on_ready = on_ready
        self._queue: deque[WatchMessage] = deque()
        self._watchers: dict[int, Watcher] = {}
        # Automatic ids only increase.
        self._next_id = 0
        # Queued answers with events or progress; at most `queue_events_max`.
        self.queued_events = 0
        # The other queued answers. The service stops reading requests while there are many.
        self.queued_controls = 0
        self.closed = False

    # Requests

    def create(
        self,
        key: bytes,
        range_end: bytes = b"",
        start_revision: int = 0,
        watch_id: int = 0,
        *,
        no_put: bool = False,
        no_delete: bool = False,
        prev_kv: bool = False,
        fragment: bool = False,
        progress_notify: bool = False,
    ) -> int:
        """Create a watch and queue the answer, `created` or a refusal; return its id, INVALID_WATCH_ID if refused.

        Arguments are as on the wire: start_revision 0 = now, watch_id 0 = automatic.
        """
        key = key or FROM_KEY
        try:
            if start_revision < 0:
                raise StoreError(errors.COMPACTED)
            if range_end and range_end != FROM_KEY and key >= range_end:
                raise StoreError(errors.WATCH_RANGE_EMPTY)
            watch_id = self._take_id(watch_id)
        except StoreError as error:
            self.refuse(error.refusal.text)
            return INVALID_WATCH_ID
        revision = self._store.mvcc.revision
        watcher = Watcher(
            self,
            watch_id,
            (key, range_end),
            start_revision,
            start_revision or revision + 1,
            no_put,
            no_delete,
            prev_kv,
            fragment,
            progress_notify,
            progress_notify,
        )
        self._watchers[watch_id] = watcher
        self.queue_control(WatchMessage(watch_id, revision, created=True))
        self._store.add(watcher)
        return watch_id

    def refuse(self, reason: str) -> None:
        """Queue the refusal of a create, also for reasons of the caller (permissions)."""
        self.queue_control(
            WatchMessage(INVALID_WATCH_ID, self._store.mvcc.revision, created=True, canceled=True, cancel_reason=reason)
        )

    def cancel(self, watch_id: int) -> None:
        """Cancel a watch and queue the answer; an unknown id gets no answer."""
        watcher = self._watchers.pop(watch_id, None)
        if watcher is None:
            return
        self._store.remove(watcher)
        self.queue_control(WatchMessage(watch_id, self._store.mvcc.revision, canceled=True))

    def request_progress(self) -> None:
        """Queue a progress answer for the whole stream if every watch has all events; otherwise do nothing."""
        if self._watchers and all(map(self._is_complete, self._watchers.values())):
            self._offer(WatchMessage(INVALID_WATCH_ID, self._store.mvcc.revision))

    def progress_tick(self) -> None:
        """Queue progress for each watch with progress_notify that had no events since the last tick."""
        for watcher in self._watchers.values():
            if not watcher.progress_notify:
                continue
            if watcher.progress_due and self._is_complete(watcher):
                self._offer(WatchMessage(watcher.watch_id, self._store.mvcc.revision))
            watcher.progress_due = True

    def close(self) -> None:
        """End all watches and drop the queue."""
        if self.closed:
            return
        self.closed = True
        for watcher in self._watchers.values():
            self._store.remove(watcher)
        self._watchers.clear()
        while self.take() is not None:
            pass
        self._store.stats.streams -= 1

    # Answers

    @property
    def has_answers(self) -> bool:
        """Return whether the queue has answers."""
        return bool(self._queue)

    @property
    def spans(self) -> dict[int, Span]:
        """The range of each watch by its id, including watches that a compaction cancelled."""
        return {watch_id: watcher.span for watch_id, watcher in self._watchers.items()}

    def take(self) -> WatchMessage | None:
        """Take the next answer to write; None when the queue is empty."""
        if not self._queue:
            return None
        message = self._queue.popleft()
        if message.created or message.canceled:
            self.queued_controls -= 1
        else:
            self.queued_events -= 1
            if message.batch is not None:
                self._store.stats.pending_events -= len(message.batch.records)
        return message

    def offer(self, watcher: Watcher, message: WatchMessage) -> bool:
        """Queue a watcher's event message; return False when the queue is full."""
        if self.queued_events >= self._store.limits.queue_events_max:
            return False
        watcher.progress_due = False
        assert message.batch is not None
        stats = self._store.stats
        count = len(message.batch.records)
        stats.pending_events += count
        stats.events += count
        self._offer(message)
        return True

    def queue_control(self, message: WatchMessage) -> None:
        """Queue a control answer, which is accepted even when the queue is full."""
        self.queued_controls += 1
        self._push(message)

    def _offer(self, message: WatchMessage) -> None:
        if self.queued_events < self._store.limits.queue_events_max:
            self.queued_events += 1
            self._push(message)

    def _push(self, message: WatchMessage) -> None:
        self._queue.append(message)
        if len(self._queue) == 1:
            self._on_ready()

    def _is_complete(self, watcher: Watcher) -> bool:
        return watcher.state is WatcherState.SYNCED and watcher.start_revision <= self._store.mvcc.revision

    def _take_id(self, watch_id: int) -> int:
        if watch_id:
            if watch_id in self._watchers:
                raise StoreError(errors.WATCH_DUPLICATE_ID)
            return watch_id
        while self._next_id in self._watchers:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1
