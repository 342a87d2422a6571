"""The guarantees of a watch, as checkers over the recorded life of one client's watch.

A test that looks at a few events proves that these events arrived; it does not prove that no other event is missing. So
the guarantees themselves are code: a client records what it sent and received (a `WatchLog`), a `Truth` holds the real
changes of the store, and each guarantee is one function that compares the two. The simulator, the tests over real
connections, `watchmux demo` and `watchmux measure` all use the functions below.

A thousand watches with thousands of events each are checked in seconds: a watch whose events equal the store's, list
against list, and whose responses are in order breaks no guarantee, which costs one comparison per event. Only other
logs go through the checkers one by one.
"""

from __future__ import annotations

from collections.abc import Callable

from coalesce.guarantees.life import (
    Bookmark,
    Canceled,
    Created,
    Life,
    Opened,
    ProgressMark,
    Received,
    ReceivedResponse,
    Reopened,
    Violation,
    WatchLog,
    WatchRecord,
    span_changes,
)
from coalesce.guarantees.truth import DELETE, PUT, Change, PreviousValue, Truth, WatchedRange, in_range

__all__ = [
    "DELETE",
    "GUARANTEES",
    "PUT",
    "Bookmark",
    "Canceled",
    "Change",
    "Created",
    "Life",
    "Opened",
    "PreviousValue",
    "Received",
    "Reopened",
    "Truth",
    "Violation",
    "WatchLog",
    "WatchRecord",
    "WatchedRange",
    "atomic",
    "bookmarkable",
    "check",
    "create_flag",
    "header_safe",
    "in_range",
    "matching",
    "ordered",
    "prev_kv_true",
    "reliable",
    "resumable",
    "unique",
]  # fmt: skip

# A log that breaks a guarantee usually breaks it a thousand times; the first few places are enough to find the cause.
VIOLATIONS_MAX = 8


def ordered(life: Life) -> list[Violation]:
    """Revisions never decrease; no response comes before `created` or after `canceled`."""
    found = [each for each in life.misplaced if each.guarantee == "ordered"]
    for span in life.spans:
        last = 0
        for change in span_changes(span):
            if change.mod_revision < last:
                found.append(Violation("ordered", f"revision {change.mod_revision} after {last}"))
            last = change.mod_revision
    return found


def unique(life: Life) -> list[Violation]:
    """No event, by (revision, key), comes twice."""
    found = []
    for span in life.spans:
        seen: set[tuple[int, bytes]] = set()
        for change in span_changes(span):
            identity = (change.mod_revision, change.key)
            if identity in seen:
                found.append(Violation("unique", f"{change.key!r} at revision {change.mod_revision} came twice"))
            seen.add(identity)
    return found


def reliable(life: Life) -> list[Violation]:
    """No matching event between the first and the last one seen is missing."""
    return _lost_as(life, "reliable", "missing although later ones came")


def atomic(life: Life) -> list[Violation]:
    """The events of one revision come in one response, or in consecutive fragments of one."""
    found = [each for each in life.misplaced if each.guarantee == "atomic"]
    for span in life.spans:
        place_of: dict[int, int] = {}
        seen: set[tuple[int, bytes]] = set()
        for place, item in enumerate(span.items):
            for change in item.changes if isinstance(item, ReceivedResponse) else ():
                revision = change.mod_revision
                repeated = (revision, change.key) in seen
                if place_of.setdefault(revision, place) != place and not repeated:
                    found.append(Violation("atomic", f"revision {revision} is spread over several responses"))
                seen.add((revision, change.key))
    return found


def resumable(life: Life) -> list[Violation]:
    """A watch from revision r gets every matching event >= r, or is cancelled with the compact_revision above it."""
    found = _lost_as(life, "resumable", "owed by the start revision and missing")
    for span in life.spans:
        if fault := life.cancel_fault(span):
            found.append(Violation("resumable", fault))
    return found


def bookmarkable(life: Life) -> list[Violation]:
    """After a progress response of revision p no event <= p comes; p never decreases, and is not below the start."""
    found = _lost_as(life, "bookmarkable", "missing although a progress response promised it had been sent")
    for span in life.spans:
        marked = event = 0
        for item in span.items:
            if isinstance(item, ProgressMark):
                if item.revision < marked:
                    found.append(Violation("bookmarkable", f"progress {item.revision} after progress {marked}"))
                elif item.revision < event:
                    found.append(Violation("bookmarkable", f"progress {item.revision} after an event of {event}"))
                elif item.revision < item.floor:
                    text = f"progress {item.revision} for a watch that starts at {item.floor}"
                    found.append(Violation("bookmarkable", text))
                marked = max(marked, item.revision)
                continue
            for change in item.changes:
                event = max(event, change.mod_revision)
                if change.mod_revision <= marked:
                    text = f"{change.key!r} at revision {change.mod_revision} after progress {marked}"
                    found.append(Violation("bookmarkable", text))
    return found


def matching(life: Life) -> list[Violation]:
    """Every event is one of the store, in the range, not filtered out, and not before the requested start."""
    found = []
    for span in life.spans:
        seen: set[tuple[int, bytes]] = set()
        for item in span.items:
            for change in item.changes if isinstance(item, ReceivedResponse) else ():
                # An event repeated after a reconnect always lies before the start; `unique` checks it.
                identity = (change.mod_revision, change.key)
                fault = _mismatch(life, change, 0 if identity in seen else item.floor)
                seen.add(identity)
                if fault:
                    found.append(Violation("matching", f"{change.key!r} at revision {change.mod_revision} {fault}"))
    return found


def _mismatch(life: Life, change: Change, floor: int) -> str:
    log = life.log
    true = life.truth.find(change.mod_revision, change.key)
    if not in_range(change.key, log.key, log.range_end):
        return f"is outside [{log.key!r}, {log.range_end!r})"
    if (log.no_put and change.kind == PUT) or (log.no_delete and change.kind == DELETE):
        return "came through the filter"
    if change.mod_revision < floor:
        return f"came on a watch that starts at {floor}"
    if true is None:
        return "is not an event of the store"
    if _content(change) != _content(true):
        return f"differs from the store's: {change} is not {true}"
    return ""


def _content(change: Change) -> tuple[int, bytes, int, int]:
    return change.kind, change.value, change.version, change.lease


def prev_kv_true(life: Life) -> list[Violation]:
    """prev_kv comes only if requested, and is the value before the change, or absent after compaction."""
    found = []
    compacted = life.truth.compact_revision
    for change in (change for span in life.spans for change in span_changes(span)):
        true = life.truth.find(change.mod_revision, change.key)
        place = f"{change.key!r} at revision {change.mod_revision}"
        if not life.log.prev_kv:
            if change.prev is not None:
                found.append(Violation("prev_kv_true", f"{place} carries a prev_kv that was not requested"))
        elif true is not None and change.prev != true.prev and life.truth.prev_known(true):
            if change.prev is None and change.mod_revision <= compacted:
                continue
            found.append(Violation("prev_kv_true", f"{place}: prev_kv {change.prev} is not {true.prev}"))
    return found


def create_flag(life: Life) -> list[Violation]:
    """An event is a create (create_revision == mod_revision) iff the key did not exist before it."""
    found = []
    for change in (change for span in life.spans for change in span_changes(span)):
        true = life.truth.find(change.mod_revision, change.key)
        if true is not None and change.create_revision != true.create_revision:
            text = f"{change.key!r} at revision {change.mod_revision}: create_revision {change.create_revision}, "
            found.append(Violation("create_flag", text + f"the store's is {true.create_revision}"))
    return found


def header_safe(life: Life) -> list[Violation]:
    """No event at or below a response's header.revision comes after it, and the header is not below its own events.

    etcd itself breaks this while a watch catches up (its headers carry the store's revision), but some clients resume
    at header.revision + 1 of every response (Node's etcd3), and with the proxy they lose no events.
    """
    found = []
    for span in life.spans:
        header = own_last = 0
        for item in span.items:
            if not isinstance(item, ReceivedResponse):
                continue
            first, last = item.changes[0].mod_revision, item.changes[-1].mod_revision
            # The rest of the last revision is checked by `atomic` and `unique`, not here.
            if own_last < first <= header:
                found.append(Violation("header_safe", f"an event of {first} after a response with header {header}"))
            if item.header < last:
                found.append(Violation("header_safe", f"header {item.header} of a response with an event of {last}"))
            header, own_last = max(header, item.header), max(own_last, last)
    return found


def _lost_as(life: Life, guarantee: str, why: str) -> list[Violation]:
    return [
        Violation(guarantee, f"{change.key!r} at revision {change.mod_revision} is {why}")
        for each, change in life.lost()
        if each == guarantee
    ]


GUARANTEES: tuple[Callable[[Life], list[Violation]], ...] = (
    ordered,
    unique,
    reliable,
    atomic,
    resumable,
    bookmarkable,
    matching,
    prev_kv_true,
    create_flag,
)


def check(
    log: WatchLog, truth: Truth, complete_through: int | None = None, *, safe_headers: bool = False
) -> list[Violation]:
    """Return the violations in a watch's life, at most `VIOLATIONS_MAX` per guarantee; empty if all are kept.

    `complete_through`: the client must have everything through this revision by now (its last span only, unless it was
    cancelled); None when that is not known. `safe_headers`: check `header_safe` too, for clients of the proxy.
    """
    life = Life(log, truth, complete_through)
    if life.faultless():
        return []
    checkers = (*GUARANTEES, header_safe) if safe_headers else GUARANTEES
    return [violation for checker in checkers for violation in checker(life)[:VIOLATIONS_MAX]]
