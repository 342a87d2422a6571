"""The surroundings of an engine under test: a scripted core, and fakes that record what the engine does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from coalesce.effects import Effect
from coalesce.inputs import Granted, Identity
from coalesce.limits import CoreLimits
from coalesce.stats import Stats
from proto.framing import Status
from proto.scan import Header
from proxy.auth.model import AnswerRead, DisconnectSession, PermissionCheck, RevisionRegressed, SendCall
from proxy.auth.queries import NO_RIGHT, Queries, RevisionRead
from proxy.auth.restore import AuthScope
from proxy.listening.write_queue import PART_CONNECTIONS
from proxy.watch.engine import Engine

HEADER = Header.make(1, 2, 3, 4)


class ScriptedCore:
    """Records each input and returns the effects that the test has scripted for it."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Any, ...]] = []
        self.effects: dict[str, list[Effect]] = {}
        self.deadline: float | None = None
        self.stats = Stats()
        self.limits = CoreLimits()
        self.ordered_progress = False
        self.header: Header | None = HEADER

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def step(*arguments: Any) -> list[Effect]:
            self.inputs.append((name, *arguments))
            return self.effects.pop(name, [])

        return step

    def next_deadline(self) -> float | None:
        return self.deadline

    def names(self) -> list[str]:
        """The names of the inputs so far."""
        return [entry[0] for entry in self.inputs]


class FakeReader:
    """Answers at once, inside the effect, as a cached probe does. The calls are decided by real `Queries`."""

    def __init__(self) -> None:
        self.header = HEADER
        self.auth_off: Header | None = None
        """The header of a recent answer that found auth off."""
        self.linearizable = True
        self.reads: list[tuple[Any, ...]] = []
        """For each call its token, and the keys and ends of its ranges."""
        self.refuses: set[bytes | None] = set()
        self.queries = Queries(1.0)
        self.listener: Any = None

    def read(self, now: RevisionRead) -> None:
        self.do(self.queries.read(now))

    def admit(self, session: Any, range_: tuple[bytes, bytes]) -> Header | None:
        del session
        assert range_ == (b"k", b"")
        return self.auth_off

    def check(self, check: PermissionCheck) -> None:
        assert check.asked == AuthScope(None, b"k", b"")
        assert check.wanted
        assert check.create is not None
        self.listener.permission(check.create, Granted(HEADER))

    def session_over(self, session: Any) -> None:
        self.queries.session_over(session)

    def connected(self, watches: Any) -> None:
        self.queries.connected()
        self.do(self.queries.prove(self.listener.own_token, watches))

    def other_history(self, header: Header) -> None:
        self.queries.other_history(header)

    def do(self, effects: Sequence[Any]) -> None:
        for effect in effects:
            if isinstance(effect, SendCall):
                call = effect.call
                self.reads.append((call.token, *(part for each in call.ranges for part in each)))
                self.queries.begin(call, self.listener.newest_revision, 0.0)
                call.linearizable = self.linearizable
                if call.ranges == NO_RIGHT or call.token not in self.refuses:
                    self.do(self.queries.answered(call, self.header))
                else:
                    self.do(self.queries.failed(call, Status.PERMISSION_DENIED, "no"))
            elif isinstance(effect, AnswerRead):
                self.listener.revision_read(effect.read, effect.header)
            elif isinstance(effect, DisconnectSession):
                self.listener.not_authorized(effect.session, effect.refusal)
            elif isinstance(effect, RevisionRegressed):
                self.listener.went_back(effect.header)

    def stop(self) -> None:
        pass


class FakeUpstream:
    """Records its calls."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.newest_revision = 0
        self.ordered_progress = False
        self.leaderless = False
        self.own_token: bytes | None = None

    def watch_leader(self) -> None:
        self.told.append(("watch leader", None))

    def revision_regressed(self, revision: int) -> None:
        self.told.append(("went back", revision))

    def check_history(self) -> None:
        self.told.append(("check history", None))

    def open(self, watch: Any) -> None:
        self.told.append(("open", watch))

    def close(self, watch: Any) -> None:
        self.told.append(("close", watch))

    def pause(self, watch: Any) -> None:
        self.told.append(("pause", watch))

    def resume(self, watch: Any) -> None:
        self.told.append(("resume", watch))

    def request_progress(self, number: int, watches: object) -> None:
        assert watches == ()
        self.told.append(("progress", number))


class FakeConnection:
    """A connection whose calls are counted by its first stream."""

    def __init__(self, outlet: FakeOutlet) -> None:
        self.h2 = outlet
        self.dirty = False
        self.schedule_flush = outlet.schedule_flush

    def write_now(self, stream: FakeOutlet, message: bytes, size: int) -> bool:
        assert size == len(message)
        if self.dirty or stream.room <= 1:
            return False
        stream.sent.append(message)
        stream.written.append(message)
        stream.room -= 1
        return True


class FakeOutlet:
    """A stream with room for `room` messages."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sent: list[bytes] = []
        self.ends: list[tuple[int, str]] = []
        self.on_end: Callable[[], None] = lambda: None
        self.stalled = False
        self.touched = 0
        self.in_parts = 0
        self.runs = 0
        self.stream: Any = self
        self.written: list[bytes] = []
        self.connection: Any = FakeConnection(self)
        self.asked_on = 0

    def take_requests(self) -> None:
        """Count the call."""
        self.asked_on += 1

    def schedule_flush(self, many: bool = False) -> None:
        self.touched += 1
        self.in_parts += many
        self.connection.dirty = True

    def send(self, *arguments: Any) -> bool:
        """Act as the connection's send(stream, pieces, size) and as the outlet's send(messages)."""
        if len(arguments) == 1:
            self.sent += arguments[0]
            self.room -= 1
            return self.room >= 0
        stream, pieces, _ = arguments
        stream.sent += pieces
        stream.room -= 1
        return bool(stream.room >= 0)

    def send_each(self, together: Any, columns: Any, size: int) -> list[int]:
        """Act as the connection's `send_each`: skip streams without room."""
        self.runs += 1
        left = [place for place, stream in enumerate(together.streams) if stream.room <= 1]
        for place, (stream, *pieces) in enumerate(zip(together.streams, *columns, strict=True)):
            assert size == sum(map(len, pieces))
            if place not in left:
                stream.sent += pieces
                stream.room -= 1
        return left

    def end(self, status: int, text: str) -> None:
        self.ends.append((status, text))
        self.on_end()


class FakeOutput:
    """Records the corks, the flushes, and the writes without a queue."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.corks = 0
        self.since = 0.0
        self.queued_bytes = 0
        self.part = PART_CONNECTIONS
        self.on_written: Callable[[float], None] | None = lambda _since: self.calls.append("wrote")
        self.written: Callable[[], None] = lambda: None
        """Called at each flush, also that of the last uncork."""

    def cork(self) -> None:
        self.corks += 1
        self.calls.append("cork")

    def uncork(self) -> None:
        self.corks -= 1
        self.calls.append("uncork")
        if not self.corks:
            self.written()

    def relieve(self) -> None:
        self.calls.append("relieve")
        self.queued_bytes = 0
        self.written()


class FakeTrunk:
    """The part of an upstream watch that the engine uses."""

    key = b"k"
    range_end = b"l"

    def tokens(self) -> Iterator[bytes | None]:
        yield b"t"


TRUNK: Any = FakeTrunk()
SPOKEN: Any = SimpleNamespace(canceled=False)


class Rig:
    """An engine with a scripted core and fakes around it."""

    def __init__(self) -> None:
        self.core = ScriptedCore()
        self.reader = FakeReader()
        self.output = FakeOutput()
        self.engine = Engine(self.core, self.reader, self.output)  # type: ignore[arg-type]  # stand-ins
        self.upstream = FakeUpstream()
        self.engine.attach(self.upstream)

    def script(self, name: str, *effects: Effect) -> None:
        """Script the effects of the next input of this name."""
        self.core.effects[name] = list(effects)


class FakeWatch(SimpleNamespace):
    """A member of a group, by its identity."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # SimpleNamespace has none


def watch_of(outlet: FakeOutlet, watch_id: int = 0) -> Any:
    """Return the part of a watch that the engine uses."""
    session = SimpleNamespace(outlet=outlet, ended=False, identity=Identity())
    return FakeWatch(outlet=outlet, watch_id=watch_id, session=session, refusal=None)


def payload_of(*texts: bytes) -> Any:
    """Return a payload whose messages contain the watch id."""

    def pieces(watch_id: int) -> tuple[bytes, ...]:
        return tuple(b"%d:%s" % (watch_id, text) for text in texts)

    def message(watch_id: int) -> bytes | None:
        return pieces(watch_id)[0] if len(texts) == 1 else None

    def columns(ids: Any) -> Any:
        return list(zip(*[pieces(watch_id) for watch_id, _, count in ids for _ in range(count)], strict=True))

    return SimpleNamespace(
        pieces=pieces, columns=columns, message=message, size=sum(map(len, texts)), event_count=len(texts)
    )
