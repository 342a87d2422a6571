"""The differences that the watch contract permits, and the form of a recording in which all else is compared.

Compared exactly: each answer to a create or cancel with its id, its header's revision, its reason and compact
revision, in order; for each watch the order of `created`, events, `canceled`; every event with all its fields and
those of prev_kv; progress answers with their revisions; how a revision is cut into fragments; how streams end; unary
calls with status, text and revision. In each recording by itself: what `violations` lists.

Permitted differences, each with its reason:

1. *Grouping.* Several revisions may come in one response or in several. etcd groups by 100 ms ticks and 1000
   revisions, the proxy by what has arrived and by bytes. The events of one revision stay together.
2. *header.revision of events.* etcd's is the store's revision when it read, at least the last event's. The proxy's is
   always the last event's (better: Node's client resumes after it and misses nothing; `violations` checks this).
3. *Order between watches of one stream.* etcd walks a hash map, and sends control answers and events through two
   channels. Checked: the order of control answers, the order within each watch, progress after the events it covers.
4. *The header of a compaction cancel.* etcd sends revision 0; the proxy the real one (better; checked).
5. *Repeated compaction cancels.* etcd may repeat one until the client cancels the id; the proxy sends it once.
6. *Merged progress answers.* Answers of the same revision in a row count as one: etcd answers each request that it
   does not drop, the proxy may answer several at once, and a client repeats its request anyway.
7. *Progress that etcd drops* (better), only in programs marked `more_progress`: etcd drops a request while a watch
   catches up, and after a compaction cancel. etcd's answers must be among the proxy's, in order.
8. *When a progress_notify comes.* Timers are not synchronous: only whether a watch was ever notified is compared, and
   each notification is checked for order and truth (`violations`).
9. *raft_term, cluster_id, member_id* differ from etcd to etcd; each must be that of the etcd behind.
10. *Breaks* (better), only in programs marked `over_breaks`: when etcd stops, its streams end, the proxy's go on. There
    each watch's events are compared, over all the streams that its client needed.
11. *The header's revision of other control answers*: answers to creates with a start revision, to cancels, and refusals
    carry the newest revision that the proxy knows; a read for each would be the call that the proxy saves etcd. It may
    be below the store's, never above, and never below an earlier header of the stream. Clients use the header of a
    `created` only for "now" (clientv3), which the proxy reads from etcd, or to resume after it (Node): lower is safe.
12. *Compacted revisions still in the proxy's history* (better), only in programs marked `from_history`: etcd cancels a
    watch from there, the proxy may send every event, as the guarantee allows. The same holds for a prev_kv below the
    compact revision, and for a quiet watch over a break (the proxy's bookmarks). Programs about compaction itself run
    without other watches that keep such a history (`lonely`).
13. *Which progress is answered under load* depends on timing, at etcd too, in programs marked `loaded_progress`: the
    answers that they wait for must come, and each must be true.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from proto.pb import kv_pb2, rpc_pb2
from tests.differential.recording import FENCE_ID, Recording, StreamRecord
from tests.differential.steps import Program

Canonical = dict[str, list[str]]
SHOWN_BYTES = 40


def differences(program: Program, direct: Recording, proxied: Recording) -> list[str]:
    """Return the unpermitted differences of two recordings of a program, one line each, aspect first."""
    etcd, proxy = canonical(program, direct), canonical(program, proxied)
    found = []
    for aspect in sorted({*etcd, *proxy}):
        one, other = etcd.get(aspect, []), proxy.get(aspect, [])
        if program.more_progress and aspect.endswith(" progress"):
            same = _subsequence(one, other)
        elif program.loaded_progress and aspect.endswith(" progress"):
            same = True
        elif program.from_history and one[-1:] and one[-1].startswith("compacted"):
            same = other == one or (other[: len(one) - 1] == one[:-1] and len(other) >= len(one))
        else:
            same = len(one) == len(other) and all(map(_equal, one, other))
        if not same:
            found.append(f"{aspect}: {_first_difference(one, other)}")
    return found


def canonical(program: Program, recording: Recording) -> Canonical:
    """Return a recording in comparable form."""
    form: Canonical = {"waited in vain": list(recording.vain), "calls": list(recording.calls)}
    if program.over_breaks:
        for name in (stream.name for stream in recording.streams):
            if name not in recording.follows.values():
                form[f"{name} events"] = _over_breaks(recording, name)
        return form
    for stream in recording.streams:
        _stream_form(form, recording, stream)
    return form


def _stream_form(form: Canonical, recording: Recording, stream: StreamRecord) -> None:
    name, base = stream.name, recording.base
    form[f"{name} end"] = [stream.end or "open"]
    controls, progress = form.setdefault(f"{name} controls", []), form.setdefault(f"{name} progress", [])
    asked = iter(stream.creates)
    for response in stream.responses:
        lines = form.setdefault(f"{name} watch {response.watch_id}", [])
        at = response.header.revision - base
        if response.created:
            create = next(asked, None)
            free = response.canceled or (create is not None and (create.start is not None or create.raw_start != 0))
            text = f"created {response.watch_id}{_refusal(response)}"
            text += f" compact {response.compact_revision}" if response.canceled else ""
            controls.append(f"{text} {_at(at, free, recording)}")
            lines.append("created")
        elif response.canceled and response.compact_revision:
            _append_new(lines, f"compacted {response.compact_revision - base}{_refusal(response)}")
        elif response.canceled:
            controls.append(f"canceled {response.watch_id}{_refusal(response)} {_at(at, True, recording)}")
            lines.append("canceled")
        elif response.events:
            lines.extend(_event(event, base) for event in response.events if event.kv.mod_revision < stream.cut)
        elif response.watch_id == -1:
            _append_new(progress, f"progress {at}")
        else:
            form[f"{name} notified {response.watch_id}"] = ["yes"]
    for watch_id, shapes in _shapes(stream).items():
        form[f"{name} fragments of {watch_id}"] = shapes


def _at(revision: int, free: bool, recording: Recording) -> str:
    """Format a header's revision; on the proxy's side a free one (11) is marked, and equals any not below it."""
    return f"@<={revision}" if free and recording.proxied else f"@{revision}"


def _equal(etcd: str, proxy: str) -> bool:
    text, mark, revision = proxy.rpartition("@<=")
    if not mark:
        return etcd == proxy
    other, _, known = etcd.rpartition("@")
    return text == other and int(revision) <= int(known)


def _refusal(response: rpc_pb2.WatchResponse) -> str:
    """Format a reason, if there is one."""
    return f" {response.cancel_reason!r}" if response.cancel_reason else ""


def _event(event: kv_pb2.Event, base: int) -> str:
    kind = kv_pb2.Event.EventType.Name(event.type)
    prev = f" prev {_kv(event.prev_kv, base)}" if event.HasField("prev_kv") else ""
    return f"{kind} {_kv(event.kv, base)}{prev}"


def _kv(kv: kv_pb2.KeyValue, base: int) -> str:
    value = bytes(kv.value)
    shown = repr(value) if len(value) <= SHOWN_BYTES else f"{len(value)} bytes {zlib.crc32(value):08x}"
    create = kv.create_revision - base if kv.create_revision else None
    return f"{bytes(kv.key)!r}={shown} mod {kv.mod_revision - base} create {create} v{kv.version} lease {kv.lease}"


def _shapes(stream: StreamRecord) -> dict[int, list[str]]:
    """Return the runs of fragments that hold one revision only, as events per piece, by watch."""
    shapes: dict[int, list[str]] = {}
    for run in _runs(stream):
        revisions = {event.kv.mod_revision for piece in run for event in piece.events}
        if len(run) > 1 and len(revisions) == 1:
            shapes.setdefault(run[0].watch_id, []).append(str([len(piece.events) for piece in run]))
    return shapes


def _runs(stream: StreamRecord) -> Iterator[list[rpc_pb2.WatchResponse]]:
    """Walk the responses with events, fragments of one joined in a list."""
    run: list[rpc_pb2.WatchResponse] = []
    for response in stream.responses:
        if response.events:
            run.append(response)
            if not response.fragment:
                yield run
                run = []
    if run:
        yield run


def _over_breaks(recording: Recording, name: str) -> list[str]:
    """Return the events of a stream and of the streams that resumed its watches."""
    streams = {stream.name: stream for stream in recording.streams}
    lines: list[str] = []
    while name in streams:
        stream = streams[name]
        for response in stream.responses:
            if response.watch_id == FENCE_ID:
                continue
            lines += [_event(event, recording.base) for event in response.events if event.kv.mod_revision < stream.cut]
            if response.compact_revision:
                _append_new(lines, f"compacted {response.compact_revision - recording.base}")
        name = recording.follows.get(name, "")
    return lines


def _append_new(lines: list[str], line: str) -> None:
    if not lines or lines[-1] != line:
        lines.append(line)


def _subsequence(one: list[str], other: list[str]) -> bool:
    rest = iter(other)
    return all(line in rest for line in one)


def _first_difference(etcd: list[str], proxy: list[str]) -> str:
    for number, (one, other) in enumerate(zip(etcd, proxy, strict=False)):
        if not _equal(one, other):
            return f"line {number}: etcd {one!r}, proxy {other!r}"
    size = min(len(etcd), len(proxy))
    return f"after {size} equal lines: etcd {etcd[size : size + 4]}, proxy {proxy[size : size + 4]}"
