"""Reads of the store's revision, "now", for the creates that need it.

A read begins after the request arrived: one is in flight at a time and serves the creates that waited when it started;
later creates wait for the next one. So "now" is never older than the request.
"""

from __future__ import annotations

from collections import deque

from coalesce.effects import ReadRevision
from coalesce.model import PendingCreate, PendingRead
from coalesce.state import CoreState
from proto.scan import Header


class RevisionReads:
    """The read in flight, the next one, and the answers that are not used yet."""

    def __init__(self, state: CoreState) -> None:
        self._state = state
        # The read in flight, and the next one, for creates that arrived since.
        self.current: PendingRead | None = None
        self.later: PendingRead | None = None
        # Creates whose read is answered and which are not prepared yet, with its header.
        self.answered: deque[tuple[PendingCreate, Header]] = deque()

    def read(self, create: PendingCreate) -> None:
        """Read "now" for a create, by a call that begins after the create arrived."""
        if create.reading:
            return
        create.reading = True
        if self.current is None:
            self.current = PendingRead()
            self.current.waiting[create] = None
            self._start(self.current)
            return
        if self.later is None:
            self.later = PendingRead()
        self.later.waiting[create] = None

    def read_again(self, create: PendingCreate) -> None:
        """Discard the revision that a waiting create has read; it is stale."""
        create.header = None
        if create.request.start_revision is None:
            self.read(create)

    def answer(self, read: PendingRead, header: Header) -> None:
        """Handle the outcome of a read, and start the next one if creates wait for it."""
        if read is not self.current:
            return
        self._state.observe_header(header)
        self.current, self.later = self.later, None
        if self.current is not None:
            self._start(self.current)
        self.answered.extend((create, header) for create in read.waiting)

    def drop_answered(self) -> None:
        """Repeat the reads that are answered but not used yet: their revisions are stale."""
        answered, self.answered = self.answered, deque()
        for create, _ in answered:
            create.reading = False
            if not create.session.ended:
                self.read(create)

    def forget(self, create: PendingCreate) -> None:
        """Drop a create whose session has ended: if etcd does not answer, the read would keep the session alive."""
        for read in (self.current, self.later):
            if read is not None:
                read.waiting.pop(create, None)

    def _start(self, read: PendingRead) -> None:
        self._state.stats.reads += 1
        self._state.effects.append(ReadRevision(read))
