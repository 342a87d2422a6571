"""The guarantees as checks of a raw stream, which each recording must pass by itself."""

from __future__ import annotations

from proto.pb import rpc_pb2
from tests.differential.recording import Recording
from tests.differential.steps import Program


def violations(program: Program, recording: Recording) -> list[str]:
    """Return the violations of a recording, one line each."""
    found: list[str] = []
    for stream in recording.streams:
        judge = _Judge(program, recording)
        for response in stream.responses:
            judge.take(response)
        found += [f"{stream.name}: {text}" for text in judge.found]
    return found


class _Judge:
    """Checks the responses of one stream."""

    def __init__(self, program: Program, recording: Recording) -> None:
        self.found: list[str] = []
        self._program = program
        self._recording = recording
        self._limit = program.request_bytes_max
        self._live: set[int] = set()
        self._compacted: set[int] = set()
        self._last: dict[int, int] = {}
        """The revision of the last event or progress, by watch."""
        self._promised = 0
        """The last progress answer."""
        self._told = 0
        """The lowest allowed header revision of the next control answer."""
        self._run: rpc_pb2.WatchResponse | None = None
        """The previous piece, if it announced more fragments."""

    def take(self, response: rpc_pb2.WatchResponse) -> None:
        """Check the next response."""
        self._header(response)
        if self._run is not None and response.watch_id != self._run.watch_id:
            self._wrong(response, "comes between the fragments of another response")
        if response.created:
            self._created(response)
        elif response.watch_id == -1:
            self._progress(response)
        elif response.watch_id not in self._live:
            if not (response.canceled and response.watch_id in self._compacted):
                self._wrong(response, "is of a watch that does not live")
            self._compacted.discard(response.watch_id)
        elif response.events:
            self._events(response)
        elif response.canceled:
            self._canceled(response)
        else:
            self._notified(response)

    def _created(self, response: rpc_pb2.WatchResponse) -> None:
        if response.canceled:
            if response.watch_id != -1:
                self._wrong(response, "refuses under an id")
            return
        if response.watch_id in self._live or response.watch_id in self._compacted:
            self._wrong(response, "gives an id twice")
        self._live.add(response.watch_id)
        self._last[response.watch_id] = 0

    def _canceled(self, response: rpc_pb2.WatchResponse) -> None:
        if not response.compact_revision:
            self._live.discard(response.watch_id)
        elif self._recording.proxied:
            # etcd may repeat it; the proxy sends it once, and the id stays taken.
            self._live.discard(response.watch_id)
            self._compacted.add(response.watch_id)

    def _progress(self, response: rpc_pb2.WatchResponse) -> None:
        if response.events or response.canceled or response.fragment:
            self._wrong(response, "is no progress answer")
        if response.header.revision < self._promised:
            self._wrong(response, "takes progress back")
        self._promised = response.header.revision
        for watch_id in self._live:
            if self._last[watch_id] > self._promised:
                self._wrong(response, f"is below what watch {watch_id} was sent")
            self._last[watch_id] = self._promised

    def _notified(self, response: rpc_pb2.WatchResponse) -> None:
        if response.header.revision < self._last[response.watch_id]:
            self._wrong(response, "takes a notify back")
        self._last[response.watch_id] = response.header.revision

    def _events(self, response: rpc_pb2.WatchResponse) -> None:
        revisions = [event.kv.mod_revision for event in response.events]
        low = self._last[response.watch_id] - (self._run is not None)
        if revisions != sorted(revisions):
            self._wrong(response, "is not ordered")
        if revisions[0] <= low:
            self._wrong(response, f"has an event at {revisions[0]} after {low}")
        self._last[response.watch_id] = revisions[-1]
        self._fragment(response)

    def _fragment(self, response: rpc_pb2.WatchResponse) -> None:
        last = response.events[-1].kv.mod_revision
        if self._run is not None and response.header.revision != self._run.header.revision:
            self._wrong(response, "has another header than the fragment before")
        if response.fragment:
            if len(response.events) > 1 and response.ByteSize() >= self._limit:
                self._wrong(response, f"is too large for a fragment: {response.ByteSize()} bytes")
            self._run = response
            return
        self._run = None
        if response.header.revision < last or (self._recording.proxied and response.header.revision != last):
            self._wrong(response, f"ends at {last}")

    def _header(self, response: rpc_pb2.WatchResponse) -> None:
        header, ids = response.header, self._recording.ids
        if (header.cluster_id, header.member_id) != ids[:2] and not response.fragment:
            self._wrong(response, "names another cluster or member")
        if header.raft_term != ids[2] and not self._program.fresh:
            self._wrong(response, f"has term {header.raft_term}, not {ids[2]}")
        unfilled = response.compact_revision and not self._recording.proxied
        if not unfilled and not 0 < header.revision <= self._recording.newest:
            self._wrong(response, "has a revision that the store never had")
        control = response.created or (response.canceled and not response.compact_revision)
        if control and header.revision < self._told:
            self._wrong(response, "takes the store's revision back")
        if control or self._recording.proxied:
            # At etcd, answers and events reach the stream through different channels.
            self._told = max(self._told, header.revision)

    def _wrong(self, response: rpc_pb2.WatchResponse, text: str) -> None:
        header = response.header.revision - self._recording.base
        self.found.append(
            f"the response @{header} to watch {response.watch_id} ({len(response.events)} events, "
            f"created {response.created}, canceled {response.canceled}) {text}"
        )
