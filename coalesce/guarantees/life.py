"""The recorded life of one client's watch, compared with the truth.

`Life` reads a log once and divides it into *spans*. In a span the client requested one unbroken history: a reconnect
that resumes at the client's own next revision continues the span; one that jumps ahead (over a compacted part) or goes
back (to get events again) starts a new one, because the client itself requested the gap or the repetition. Fragments
are joined; an incomplete run that a reconnect cut off counts as not received.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from coalesce.guarantees.truth import Change, Truth, WatchedRange


class Opened(NamedTuple):
    """The client sent its create request; `start_revision` None is now."""

    start_revision: int | None


class Created(NamedTuple):
    """The `created` answer arrived with this header revision."""

    revision: int


class Received(NamedTuple):
    """A response with events arrived; `revision` is its header's; `fragment`: more pieces of it follow."""

    revision: int
    changes: Sequence[Change]
    fragment: bool = False


class Bookmark(NamedTuple):
    """A progress response arrived, under the watch's own id or under -1 for all of its session."""

    revision: int


class Canceled(NamedTuple):
    """The `canceled` answer arrived; `compact_revision` is 0 unless compaction was the cause."""

    compact_revision: int
    reason: str


class Reopened(NamedTuple):
    """The client lost its session and created the watch again on a new one, from this revision (None: from now)."""

    start_revision: int | None


WatchRecord = Opened | Created | Received | Bookmark | Canceled | Reopened


@dataclass(slots=True)
class WatchLog:
    """The request of one watch, and everything that happened to it, in the order its client saw it."""

    key: bytes
    range_end: bytes = b""
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    records: list[WatchRecord] = field(default_factory=list)

    @property
    def asked(self) -> WatchedRange:
        """The range and options it requested."""
        return WatchedRange(self.key, self.range_end, self.no_put, self.no_delete, self.prev_kv)


class Violation(NamedTuple):
    """A broken guarantee: which one, and where."""

    guarantee: str
    text: str


class ReceivedResponse(NamedTuple):
    """A response with events, its fragments joined."""

    header: int
    changes: Sequence[Change]
    floor: int  # the start revision of its create or reopen


class ProgressMark(NamedTuple):
    """A progress response, and the lowest revision it may have at this place."""

    revision: int
    floor: int


@dataclass(slots=True)
class WatchSpan:
    """A part of a watch's life in which its client requested one unbroken history."""

    # First revision owed; None until the `created` header of a watch from now is known.
    start: int | None
    items: list[ReceivedResponse | ProgressMark] = field(default_factory=list)
    # (start revision, number of items before it) of each session in the span, its first included.
    sessions: list[tuple[int, int]] = field(default_factory=list)
    last_event: int = 0
    last_mark: int = 0
    last_header: int = 0
    canceled: Canceled | None = None
    # The revision from which the client would have resumed when `canceled` arrived.
    canceled_next: int = 0
    # The client requested now, and this is still the session in which it did.
    from_now: bool = False
    # Every response and bookmark so far is in order after the one before (revisions inside responses not checked).
    regular: bool = True

    @property
    def next_revision(self) -> int:
        """The first revision the client does not have yet, by the responses it received."""
        return max(self.start or 0, self.last_event + 1, self.last_mark + 1, self.last_header + 1)


class Life:
    """A log compared with the truth: its spans, and the records found out of place while reading."""

    def __init__(self, log: WatchLog, truth: Truth, complete_through: int | None = None) -> None:
        self.log = log
        self.truth = truth
        self.complete_through = complete_through
        self.spans: list[WatchSpan] = []
        self.misplaced: list[Violation] = []
        self._run: list[Received] = []
        self._waits_for_created = False
        self._lost: list[tuple[str, Change]] | None = None
        for record in log.records:
            if isinstance(record, Received):
                self._received(record)
            elif isinstance(record, Opened | Reopened):
                self._run.clear()
                self._opened(record.start_revision)
            else:
                self._control(record)

    def _opened(self, start: int | None) -> None:
        self._waits_for_created = True
        span = self.spans[-1] if self.spans else None
        if span is not None and start is not None and span.start is not None:
            resumes = max(span.last_event, span.start - 1) < start <= span.next_revision
            if resumes:
                span.canceled, span.from_now = None, False
                span.sessions.append((start, len(span.items)))
                return
        self.spans.append(WatchSpan(start, from_now=start is None))
        if start is not None:
            self.spans[-1].sessions.append((start, 0))

    def _control(self, record: Created | Bookmark | Canceled) -> None:
        if self._run:
            self._run.clear()
            self._found("atomic", f"{record} between the fragments of one response")
        bookmark = isinstance(record, Bookmark)
        if not self.spans or (bookmark and (self._waits_for_created or self.spans[-1].canceled is not None)):
            self._misplace(record)
        span = self.spans[-1]
        if isinstance(record, Created):
            self._waits_for_created = False
            if span.start is None:
                span.start = record.revision + 1
                span.sessions.append((span.start, 0))
        elif isinstance(record, Canceled):
            if span.canceled is None:
                span.canceled = record
                # Headers do not count: etcd's prove nothing while a watch catches up.
                span.canceled_next = max(span.start or 0, span.last_event + 1, span.last_mark + 1)
        else:
            # A watch from now has everything through its created header; any other begins at the revision it named.
            floor = (span.sessions[-1][0] if span.sessions else 0) - span.from_now
            span.regular &= record.revision >= max(floor, span.last_mark, span.last_event)
            span.items.append(ProgressMark(record.revision, floor))
            span.last_mark = max(span.last_mark, record.revision)

    def _received(self, record: Received) -> None:
        """Handle one response. Reading a log spends most of its time here, so the common case is fast."""
        if self._waits_for_created or not self.spans or self.spans[-1].canceled is not None:
            self._misplace(record)
        span = self.spans[-1]
        header, changes, fragment = record
        if fragment or self._run:
            if self._run and self._run[0].revision != header:
                self._found("atomic", f"a fragment under header {header} after one under {self._run[0].revision}")
            self._run.append(record)
            if fragment:
                return
            changes = [change for piece in self._run for change in piece.changes]
            self._run.clear()
        if not changes:
            return
        floor = span.sessions[-1][0] if span.sessions else 0
        first, last = changes[0].mod_revision, changes[-1].mod_revision
        if not (first > span.last_header and first > span.last_mark and first >= floor and header >= last):
            span.regular = False
        span.items.append(ReceivedResponse(header, changes, floor))
        if last > span.last_event:
            span.last_event = last
        if header > span.last_header:
            span.last_header = header

    def _misplace(self, record: WatchRecord) -> None:
        """Report a record at a place where it is not allowed, and make sure that there is a span for it."""
        if not self.spans:
            self._found("ordered", f"{record} before the watch was opened")
            self.spans.append(WatchSpan(None))
        elif self._waits_for_created:
            self._found("ordered", f"{record} before `created`")
        else:
            self._found("ordered", f"{record} after `canceled`")

    def _found(self, guarantee: str, text: str) -> None:
        self.misplaced.append(Violation(guarantee, text if len(text) < 300 else text[:300] + "..."))

    def through(self, span: WatchSpan) -> int:
        """Return the revision through which this span must be complete."""
        seen = max(span.last_event, span.last_mark)
        if span is self.spans[-1] and span.canceled is None and self.complete_through is not None:
            return max(seen, self.complete_through)
        return seen

    def cancel_fault(self, span: WatchSpan) -> str:
        """Return what is wrong with the cancel by compaction that ended the span; empty if it is correct."""
        compact = span.canceled.compact_revision if span.canceled is not None else 0
        if compact and compact not in self.truth.compact_revisions:
            return f"cancelled at {compact}, where the store never was compacted"
        if compact and span.start is not None and span.canceled_next >= compact:
            return f"cancelled as compacted at {compact} although it needed nothing before {span.canceled_next}"
        return ""

    def faultless(self) -> bool:
        """Return whether, by one comparison per event, no guarantee is broken; False: run the checkers."""
        if self.misplaced:
            return False
        for span in self.spans:
            if not span.regular or self.cancel_fault(span):
                return False
            if span.start is None:
                if span.items:
                    return False
                continue
            got = list(span_changes(span))
            if got != self.truth.expected(self.log.asked, span.start, self.through(span)):
                return False
        return True

    def lost(self) -> list[tuple[str, Change]]:
        """Return every missing change, with the guarantee that its absence breaks."""
        if self._lost is None:
            self._lost = [each for span in self.spans for each in self._lost_in(span)]
        return self._lost

    def _lost_in(self, span: WatchSpan) -> list[tuple[str, Change]]:
        if span.start is None:
            return []
        got = {(change.mod_revision, change.key) for change in span_changes(span)}
        gaps = _session_gaps(span)
        found: list[tuple[str, Change]] = []
        for change in self.truth.expected(self.log.asked, span.start, self.through(span)):
            revision = change.mod_revision
            if (revision, change.key) in got:
                continue
            if revision > span.last_event:
                guarantee = "bookmarkable" if revision <= span.last_mark else "resumable"
            else:
                guarantee = "resumable" if any(low < revision < high for low, high in gaps) else "reliable"
            found.append((guarantee, change))
        return found


def span_changes(span: WatchSpan) -> Iterable[Change]:
    """Return all changes of a span, in the order of their arrival."""
    return chain.from_iterable(item.changes for item in span.items if isinstance(item, ReceivedResponse))


def _session_gaps(span: WatchSpan) -> list[tuple[int, int]]:
    """Return, for each session of the span, the revisions between which its first event must lie (exclusive)."""
    gaps = []
    for start, place in span.sessions:
        before = [
            c.mod_revision for item in span.items[:place] if isinstance(item, ReceivedResponse) for c in item.changes
        ]
        after = (
            c.mod_revision for item in span.items[place:] if isinstance(item, ReceivedResponse) for c in item.changes
        )
        gaps.append((max(before, default=start - 1), next(after, span.last_event + 1)))
    return gaps
