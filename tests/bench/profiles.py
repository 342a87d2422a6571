"""What a client library sends while it receives: its settings, windows and PINGs, for the load generator.

Each profile follows a capture of the real library (tests/bench/capture.py, docs/evidence/clients.md):

- grpc-go (clientv3, and so most clients of etcd): small windows that grow with the bandwidth. A read with DATA is
  answered with a WINDOW_UPDATE of the connection and a PING, unless the last PING is not yet acknowledged
  (internal/transport/bdp_estimator.go, flowcontrol.go).
- C-core (grpcio): a window of 4 MiB; a PING every 0.1 s at first, less and less often while the bandwidth stays the
  same, and with it the WINDOW_UPDATEs of all streams (src/core/lib/transport/bdp_estimator.cc).
- grpc-js (Node's nghttp2): no PINGs; a WINDOW_UPDATE when half of a window is used.
- wide: windows of 2 GiB and nothing sent, for programs that are not measured.
"""

from __future__ import annotations

import struct
import time

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = 1
WINDOW_DEFAULT = 65_535
WINDOW_MAX = 2**31 - 1

_pack_head = struct.Struct(">IBI").pack
_pack_update = struct.Struct(">IBII").pack


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Make one HTTP/2 frame."""
    return _pack_head(len(payload) << 8 | kind, flags, stream) + payload


def window_update(stream: int, size: int) -> bytes:
    """Make a WINDOW_UPDATE."""
    return _pack_update(4 << 8 | WINDOW_UPDATE, 0, stream, size)


def settings(**values: int) -> bytes:
    """Make a SETTINGS frame: _1=4096, _4=65535, by number."""
    pairs = (struct.pack(">HI", int(name[1:]), value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, b"".join(pairs))


class Wide:
    """Windows so large that nothing needs to be sent."""

    opening = settings(_4=WINDOW_MAX, _5=2**24 - 1) + window_update(0, WINDOW_MAX - WINDOW_DEFAULT)
    """What follows the preface."""

    counts = False
    """Whether `received` needs the bytes of each stream."""

    def received(self, by_stream: dict[int, int]) -> bytes:
        """Return what is sent after a read with DATA, `by_stream` payload bytes (cleared)."""
        del by_stream
        return b""

    def acknowledged(self) -> bytes:
        """Return what is sent when a PING is acknowledged."""
        return b""


class GrpcGo(Wide):
    """grpc-go."""

    opening = settings()
    counts = True
    PING = frame(PING, 0, 0, bytes((2, 4, 16, 16, 9, 14, 7, 7)))
    BDP_MAX = 16 << 20

    def __init__(self) -> None:
        self._window = WINDOW_DEFAULT
        self._unacknowledged = 0
        """Bytes of the connection's window that were used since its last update."""
        self._used: dict[int, int] = {}
        """The same by stream."""
        self._sample = 0
        """Bytes since the PING in flight."""
        self._pinged_s = 0.0
        """When it was sent; 0: none is in flight."""
        self._samples = 0
        self._round_trip_s = 0.0
        self._bandwidth_max = 0.0

    def received(self, by_stream: dict[int, int]) -> bytes:
        quarter = self._window // 4
        out = b""
        used = self._used
        for stream, size in by_stream.items():
            total = used.get(stream, 0) + size
            if total >= quarter:
                out += window_update(stream, total)
                total = 0
            used[stream] = total
        size = sum(by_stream.values())
        by_stream.clear()
        self._unacknowledged += size
        ping = not self._pinged_s and self._window < self.BDP_MAX
        if ping or self._unacknowledged >= quarter:
            out += window_update(0, self._unacknowledged)
            self._unacknowledged = 0
        if ping:
            self._pinged_s = time.perf_counter()
            self._sample = size
            self._samples += 1
            return out + self.PING
        self._sample += size
        return out

    def acknowledged(self) -> bytes:
        if not self._pinged_s:
            return b""
        took_s = time.perf_counter() - self._pinged_s
        self._pinged_s = 0.0
        self._round_trip_s += (took_s - self._round_trip_s) * (1 / self._samples if self._samples < 10 else 0.9)
        bandwidth = self._sample / (self._round_trip_s * 1.5)
        self._bandwidth_max = max(self._bandwidth_max, bandwidth)
        if self._sample < 0.66 * self._window or bandwidth < self._bandwidth_max:
            return b""
        before, self._window = self._window, min(2 * self._sample, self.BDP_MAX)
        larger = window_update(0, self._window - before) if self._window > before else b""
        return larger + settings(_4=self._window)


class CCore(Wide):
    """grpcio."""

    opening = settings(_2=0, _3=0, _4=4 << 20, _5=4 << 20, _6=16_384, _65027=1) + window_update(
        0, (4 << 20) - WINDOW_DEFAULT
    )
    counts = True
    PING = frame(PING, 0, 0, b"bdp-ping")
    HALF = 2 << 20

    def __init__(self) -> None:
        self._used: dict[int, int] = {}
        self._total = 0
        self._next_s = 0.0
        """No PING before that time; the capture shows 0.1 s at first, and about 0.4 s after a few seconds."""
        self._delay_s = 0.1
        self._stable = 0

    def received(self, by_stream: dict[int, int]) -> bytes:
        used = self._used
        for stream, size in by_stream.items():
            used[stream] = used.get(stream, 0) + size
            self._total += size
        by_stream.clear()
        now = time.perf_counter()
        ping = now >= self._next_s
        if not ping and self._total < self.HALF:
            return b""
        updates = window_update(0, self._total) + b"".join(window_update(*each) for each in used.items())
        used.clear()
        self._total = 0
        if not ping:
            return updates
        self._stable += 1
        if self._stable >= 2 and self._delay_s < 10:
            self._stable = 0
            self._delay_s += 0.15
        self._next_s = now + self._delay_s
        return updates + self.PING


class GrpcJs(Wide):
    """grpc-js: the windows of nghttp2."""

    opening = settings(_4=WINDOW_DEFAULT)
    counts = True
    HALF = WINDOW_DEFAULT // 2

    def __init__(self) -> None:
        self._used: dict[int, int] = {}

    def received(self, by_stream: dict[int, int]) -> bytes:
        used = self._used
        by_stream[0] = sum(by_stream.values())
        out = b""
        for stream, size in by_stream.items():
            total = used.get(stream, 0) + size
            if total >= self.HALF:
                out += window_update(stream, total)
                total = 0
            used[stream] = total
        by_stream.clear()
        return out


PROFILES: dict[str, type[Wide]] = {"grpc-go": GrpcGo, "C-core": CCore, "grpc-js": GrpcJs, "wide": Wide}
DEFAULT = "grpc-go"
