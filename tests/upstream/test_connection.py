"""Connections on real sockets: the error texts when connecting fails, and how calls start, flow and end."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from proto.framing import Status
from proto.http2 import ErrorCode, Headers, Http2Limits
from tests.etcd.server import EtcdServer, free_port
from tests.upstream.certificates import Certificates
from tests.upstream.scripted import STATUS, ScriptedCall, ScriptedEtcd, scripted
from tests.waiting import run, until_async
from upstream.connecting import connect
from upstream.connection import ClientConnection, NotSent
from upstream.endpoints import parse_endpoint
from upstream.errors import CallFailed, Unreachable, explain_connect
from upstream.heads import request_headers
from upstream.settings import ConnectionSettings
from upstream.tls import client_context, server_context
from upstream.transport import ServerAddress, connected_to, open_transport
from upstream.unary import NotProcessed, call_unary

ECHO = "/test/Echo"
PATIENT = ConnectionSettings()
FAST = ConnectionSettings(connect_timeout_s=0.3)


async def refused(endpoint: str, tls: ssl.SSLContext | None = None, settings: ConnectionSettings = PATIENT) -> str:
    """Return the text of a failed attempt."""
    with pytest.raises(Unreachable) as refusal:
        await connect(parse_endpoint(endpoint), tls, settings)
    text = str(refusal.value)
    assert text.startswith(f"{endpoint}: ")
    assert "\n" not in text
    assert "Error" not in text
    return text


@asynccontextmanager
async def answering(answer: bytes, stay: bool = False) -> AsyncIterator[str]:
    """Run a server that answers the first bytes with fixed bytes; yield its endpoint."""
    open_now: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.append(writer)
        await reader.read(10)
        writer.write(answer)
        if stay:
            await reader.read()
        writer.close()
        open_now.remove(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await until_async(lambda: not open_now, "the client to disconnect")


class Collected:
    """A CallHandler that keeps everything."""

    def __init__(self, consume: bool = True) -> None:
        self.call: Any = None
        self.consume = consume
        self.headers: Headers = []
        self.data = b""
        self.drained = 0
        self.ends: list[tuple[int, str, Headers]] = []

    def on_headers(self, headers: Headers) -> None:
        self.headers = headers

    def on_data(self, data: bytes, flow_size: int) -> None:
        self.data += data
        if self.consume:
            self.call.consumed(flow_size)

    def on_drained(self) -> None:
        self.drained += 1

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        self.ends.append((status, message, trailers))


def start(connection: ClientConnection, path: str = ECHO, consume: bool = True) -> Collected:
    """Start a call."""
    seen = Collected(consume)
    seen.call = connection.request(request_headers(connection, path.encode()), seen)
    return seen


async def test_error_texts_when_no_server_answers(tmp_path: Path) -> None:
    assert "connection refused; check that etcd runs" in await refused(f"127.0.0.1:{free_port()}")
    assert "cannot be resolved; check the spelling" in await refused("no-such-host.invalid:2379")
    assert "there is no such socket" in await refused(f"unix://{tmp_path}/none.sock")
    async with scripted() as silent:
        silent.mute = True
        assert "no answer in time" in await refused(silent.endpoint, settings=FAST)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks HTTP/1, unlike etcd"),
        (b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n", "it expects TLS"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "it expects TLS; use https://"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP/2"),
        (b"", "it closed the connection at once; if it expects TLS, use https://"),
        # A SETTINGS frame of a wrong size.
        (b"\x00\x00\x01\x04\x00\x00\x00\x00\x00x", "the server violated HTTP/2 (FRAME_SIZE_ERROR"),
    ],
)
async def test_error_texts_when_the_server_is_not_an_etcd(answer: bytes, complaint: str) -> None:
    async with answering(answer) as endpoint:
        assert complaint in await refused(endpoint)


async def test_error_texts_when_a_real_etcd_speaks_no_tls(etcd: EtcdServer, certificates: Certificates) -> None:
    text = await refused(f"https://{etcd.endpoint}", client_context(cacert=certificates.ca))
    assert f"https://{etcd.endpoint}: it closed the connection during the TLS handshake; if it does not use TLS" in text
    assert "use http:// for this endpoint" in text


def test_the_error_text_when_the_own_certificate_has_expired() -> None:
    """Go's alert, as Python's ssl names it."""
    error = ssl.SSLError(1, "sslv3 alert certificate expired")
    error.reason = "SSLV3_ALERT_CERTIFICATE_EXPIRED"
    text = str(explain_connect(error, "https://etcd:1", secure=True))
    assert text.startswith("https://etcd:1: it says that our certificate has expired; renew the files of --cert and")


async def test_error_texts_when_tls_does_not_match(certificates: Certificates) -> None:
    files = certificates
    trusting = client_context(cacert=files.ca)
    server_side = server_context(files.server_cert, files.server_key)
    async with scripted() as plain:
        assert "it does not speak TLS; use http://" in await refused(f"https://{plain.endpoint}", trusting)
    async with scripted(server_side) as secure:
        text = await refused(f"http://{secure.endpoint}", trusting)
        assert "use https://" in text
        text = await refused(f"https://{secure.endpoint}", client_context(cacert=files.other_ca))
        assert "its certificate is not trusted" in text
        assert "--cacert" in text
        # Without a context the system's authorities are used.
        assert "its certificate is not trusted" in await refused(f"https://{secure.endpoint}")
        careless = client_context(insecure_skip_verify=True)
        connection = await connect(parse_endpoint(f"https://{secure.endpoint}"), careless)
        connection.close()
    async with scripted(server_context(files.server_cert, files.server_key, files.ca)) as strict:
        text = await refused(f"https://{strict.endpoint}", trusting)
        assert "--cert and --key" in text
    http1 = server_context(files.server_cert, files.server_key)
    http1.set_alpn_protocols(["http/1.1"])
    async with scripted(http1) as old:
        text = await refused(f"https://{old.endpoint}", trusting)
        assert "HTTP/2" in text


async def test_a_certificate_for_another_name(certificates: Certificates) -> None:
    async with scripted(server_context(certificates.client_cert, certificates.client_key)) as etcd:
        text = await refused(f"https://{etcd.endpoint}", client_context(cacert=certificates.ca))
        assert "connect by a name or address that the certificate lists" in text


async def echo(etcd: ScriptedEtcd, endpoint: str, tls: ssl.SSLContext | None = None) -> None:
    """Check that a call works."""
    closed: list[ClientConnection] = []
    connection = await connect(parse_endpoint(endpoint), tls, on_closed=closed.append)
    assert connection.healthy
    answer, trailers = await call_unary(connection, ECHO, b"hello", [(b"hasleader", b"true")], timeout_s=5)
    assert answer == b"hello"
    assert (b"grpc-status", b"0") in trailers
    metadata = etcd.calls[-1].metadata
    assert metadata[b"hasleader"] == b"true"
    assert metadata[b"grpc-timeout"] == b"5000000u"
    assert metadata[b"te"] == b"trailers"
    assert metadata[b":scheme"] == (b"https" if connection.secure else b"http")
    await until_async(lambda: etcd.calls[-1].ended, "the end of the call")
    assert connection.open_calls == 0
    connection.close()
    assert closed == [connection]
    assert connection.failure is not None
    with pytest.raises(NotSent):
        start(connection)
    await until_async(lambda: not etcd.connections, "the connection to be closed")


async def test_plain_tls_and_unix_sockets(certificates: Certificates, tmp_path: Path) -> None:
    files = certificates
    async with scripted() as etcd:
        await echo(etcd, etcd.endpoint)
        await echo(etcd, f"http://{etcd.endpoint}", client_context(cacert=files.ca))
    strict = server_context(files.server_cert, files.server_key, files.ca)
    mutual = client_context(files.client_cert, files.client_key, files.ca)
    asked_for: list[str | None] = []
    strict.sni_callback = lambda _connection, name, _context: asked_for.append(name)
    async with scripted(strict) as etcd:
        await echo(etcd, f"https://{etcd.endpoint}", mutual)
        await echo(etcd, etcd.endpoint, mutual)
        await echo(etcd, f"localhost:{etcd.port}", mutual)
    # A name is sent to the server (SNI), an address is not (RFC 6066 section 3).
    assert asked_for == [None, None, "localhost"]
    async with scripted(path=str(tmp_path / "s")) as etcd:
        await echo(etcd, f"unix://{tmp_path}/s")
    async with scripted(strict, path=str(tmp_path / "t")) as etcd:
        await echo(etcd, f"unixs://{tmp_path}/t", mutual)


def test_uvloop_is_the_same(certificates: Certificates) -> None:
    import uvloop

    async def story() -> None:
        async with scripted() as etcd:
            await echo(etcd, etcd.endpoint)
        assert "connection refused" in await refused(f"127.0.0.1:{free_port()}")
        assert "cannot be resolved" in await refused("no-such-host.invalid:2379")
        async with scripted(server_context(certificates.server_cert, certificates.server_key)) as etcd:
            await echo(etcd, f"https://{etcd.endpoint}", client_context(cacert=certificates.ca))
            assert "not trusted" in await refused(f"https://{etcd.endpoint}")
            assert "use https://" in await refused(f"http://{etcd.endpoint}")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


def test_a_transport_closed_at_once_releases_its_socket() -> None:
    """Under uvloop the socket would close its descriptor's number once more, which another connection may have."""
    import uvloop

    class Closing(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            cast("asyncio.Transport", transport).abort()

    async def story() -> int:
        async with scripted() as etcd:
            connected = await connected_to(ServerAddress(socket.AF_INET, ("127.0.0.1", etcd.port)))
            await until_async(lambda: etcd.connections, "the connection to be accepted")
            await open_transport(Closing, connected, None, "")
            await until_async(lambda: not etcd.connections, "the connection to end")
            return connected.detach()

    for loop in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=loop) as runner:
            assert runner.run(story()) == -1, loop


def test_a_ping_that_is_answered_at_once_is_answered() -> None:
    """uvloop's clock counts milliseconds: an answer may arrive at the same clock time at which the PING was sent."""
    import uvloop

    async def story() -> None:
        settings = ConnectionSettings(keepalive_s=0.01, keepalive_timeout_s=0.3)
        async with scripted() as etcd:
            connection = await connect(parse_endpoint(etcd.endpoint), None, settings)
            etcd.on_message = lambda _call, _message: None
            start(connection)
            (server,) = etcd.connections
            goal = server.heard + 6
            await until_async(lambda: server.heard > goal or not connection.healthy, "many pings")
            assert connection.healthy, connection.failure
            connection.close()
            await until_async(lambda: not etcd.connections, "the connection to end")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


async def test_urgent_output_is_written_before_the_end_of_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first output; later output in the same turn of the loop shares one write."""
    async with scripted() as server:
        connection = await connect(parse_endpoint(server.endpoint), None, PATIENT)
        sent: list[int] = []
        write_output = connection._write_output

        def counted() -> None:
            # Further writes answer the server's SETTINGS and PING.
            if call.stream.send_window not in sent:
                sent.append(call.stream.send_window)
            write_output()

        call = start(connection).call
        await until_async(lambda: not connection._flush_scheduled, "the request to be written")
        monkeypatch.setattr(connection, "_write_output", counted)
        window = call.stream.send_window
        for _ in range(3):
            call.write((b"\0\0\0\0\0",), 5)
            connection.flush_now()
        assert sent == [window - 5]
        await until_async(lambda: len(sent) > 1, "the end of the turn")
        assert sent == [window - 5, window - 15]
        connection.close()


async def test_how_a_call_can_end() -> None:
    async with scripted() as etcd:
        connection = await connect(parse_endpoint(etcd.endpoint), None)

        async def ended(finish: Callable[[ScriptedCall], None]) -> Collected:
            seen = start(connection)
            await until_async(lambda: etcd.calls and etcd.calls[-1].ended == "", "the call")
            finish(etcd.calls[-1])
            await until_async(lambda: seen.ends, "its end")
            etcd.calls[-1].ended = "x"
            assert seen.call.ended
            # These have no effect any more.
            seen.call.write((b"x",), 1)
            seen.call.reset()
            return seen

        only = await ended(lambda call: call.end(5, "key 100% gone"))
        assert only.ends[0][:2] == (5, "key 100% gone")
        assert only.headers == []
        assert (b"content-type", b"application/grpc") in only.ends[0][2]

        def answer(call: ScriptedCall) -> None:
            call.send_raw(b"abc")
            call.end()

        whole = await ended(answer)
        assert (whole.data, whole.ends[0][0]) == (b"abc", 0)
        assert whole.call.http_status == 200
        reset = await ended(lambda call: call.reset(ErrorCode.ENHANCE_YOUR_CALM))
        assert (reset.ends[0][0], reset.call.reset_code) == (Status.RESOURCE_EXHAUSTED, ErrorCode.ENHANCE_YOUR_CALM)
        assert not reset.call.unprocessed
        unseen = await ended(lambda call: call.reset(ErrorCode.REFUSED_STREAM))
        assert (unseen.ends[0][0], unseen.call.unprocessed) == (Status.UNAVAILABLE, True)

        def http(call: ScriptedCall) -> None:
            call.start(b"503")
            call.connection.http2.send(call.stream, (b"<html>",), 6, True)
            call.connection.flush()

        strange = await ended(http)
        assert strange.ends == [(14, "the server answered with HTTP status 503, not with gRPC", [])]
        lost = await ended(lambda _: etcd.drop())
        assert lost.ends[0][0] == Status.UNAVAILABLE
        assert "connection" in lost.ends[0][1]
        assert not connection.healthy


async def test_flow_control_goes_both_ways() -> None:
    async with scripted() as etcd:
        etcd.limits = Http2Limits(initial_window=70_000)
        etcd.on_message = lambda _, __: None
        settings = ConnectionSettings(stream_window_bytes=70_000)
        connection = await connect(parse_endpoint(etcd.endpoint), None, settings)
        seen = start(connection, consume=False)
        await until_async(lambda: etcd.calls, "the call")
        call = etcd.calls[0]
        call.send_raw(bytes(100_000))
        await until_async(lambda: len(seen.data) == 70_000, "a window of data")
        assert call.stream.blocked
        seen.call.consumed(70_000)
        await until_async(lambda: len(seen.data) == 100_000, "the rest")
        # Outbound: blocked by the window, drained when the server has read the data.
        assert seen.call.write((bytes(50_000), bytes(50_000)), 100_000) is False
        assert seen.call.blocked
        await until_async(lambda: seen.drained, "the server to read")
        assert not seen.call.blocked
        seen.call.end()
        await until_async(lambda: call.ended == "end", "the half-close")
        connection.close()


@pytest.mark.parametrize("how", ["reset", "end"])
async def test_flow_control_a_call_kept_is_returned_at_its_end(how: str) -> None:
    async with scripted() as etcd:
        settings = ConnectionSettings(stream_window_bytes=70_000, connection_window_bytes=70_000)
        connection = await connect(parse_endpoint(etcd.endpoint), None, settings)
        for number in range(3):
            seen = start(connection, consume=False)
            await until_async(lambda number=number: len(etcd.calls) == number + 1, "the call")  # type: ignore[misc] # bound at once
            etcd.calls[number].send_raw(bytes(60_000))
            await until_async(lambda seen=seen: len(seen.data) == 60_000, "the data")  # type: ignore[misc] # bound at once
            if how == "reset":
                seen.call.reset()
            else:
                etcd.calls[number].end()
                await until_async(lambda seen=seen: seen.ends, "the end")  # type: ignore[misc] # bound at once
            # Too late: it is not counted twice.
            seen.call.consumed(60_000)
        connection.close()


async def test_full_transport_buffer_pauses_the_connection() -> None:
    async with scripted() as etcd:
        etcd.limits = Http2Limits(initial_window=64 << 20, connection_window=64 << 20)
        etcd.on_message = lambda _, __: None
        connection = await connect(parse_endpoint(etcd.endpoint), None)
        seen = start(connection)
        await until_async(lambda: etcd.calls, "the call")
        transport = etcd.connections[0].transport
        assert transport is not None
        transport.pause_reading()
        for _ in range(100):
            seen.call.write((bytes(1 << 18),), 1 << 18)
            await asyncio.sleep(0)
            if seen.call.blocked:
                break
        assert connection.http2.paused
        transport.resume_reading()
        await until_async(lambda: seen.drained, "the rest to be written")
        assert not connection.http2.paused
        connection.close()


async def test_goaway_lets_calls_finish_and_takes_no_new_ones() -> None:
    async with scripted() as etcd:
        closed: list[ClientConnection] = []
        connection = await connect(parse_endpoint(etcd.endpoint), None, on_closed=closed.append)
        first, second = start(connection), start(connection)
        await until_async(lambda: len(etcd.calls) == 2, "the calls")
        etcd.connections[0].go_away(last_id=1)
        await until_async(lambda: closed, "the news")
        assert second.ends[0][0] == Status.UNAVAILABLE
        assert second.call.unprocessed
        assert not first.ends
        assert not connection.healthy
        with pytest.raises(NotSent):
            start(connection)
        etcd.calls[0].send_raw(b"still here")
        etcd.calls[0].end()
        await until_async(lambda: first.ends, "the first call's end")
        assert first.data == b"still here"
        assert "is closing the connection" in str(connection.failure)
        await until_async(lambda: not etcd.connections, "the connection to be closed")


async def test_unary_calls_that_fail() -> None:
    async with scripted() as etcd:
        connection = await connect(parse_endpoint(etcd.endpoint), None)

        async def failure(on_message: Callable[[ScriptedCall, bytes], None], **extra: Any) -> CallFailed:
            etcd.on_message = on_message
            with pytest.raises(CallFailed) as error:
                await call_unary(connection, ECHO, b"x", **extra)
            return error.value

        error = await failure(lambda call, _: call.end(9, "learner"))
        assert (error.status, error.text) == (9, "learner")
        assert isinstance(await failure(lambda call, _: call.reset(ErrorCode.REFUSED_STREAM)), NotProcessed)
        assert (await failure(lambda call, _: call.end())).status == Status.INTERNAL

        def twice(call: ScriptedCall, _: bytes) -> None:
            call.send(b"1")
            call.send(b"2")
            call.end()

        assert (await failure(twice)).status == Status.INTERNAL
        error = await failure(lambda call, _: call.send(bytes(100)), message_bytes_max=10)
        assert error.status == Status.RESOURCE_EXHAUSTED
        error = await failure(lambda _, __: None, timeout_s=0.01)
        assert error.status == Status.DEADLINE_EXCEEDED
        await until_async(lambda: etcd.calls[-1].ended == "CANCEL", "the reset")
        connection.close()


async def test_settings_have_to_be_acknowledged() -> None:
    # SETTINGS, and no more bytes.
    async with answering(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", stay=True) as endpoint:
        closed: list[ClientConnection] = []
        settings = ConnectionSettings(settings_timeout_s=0.05)
        connection = await connect(parse_endpoint(endpoint), None, settings, closed.append)
        await until_async(lambda: closed, "the end")
        assert "did not acknowledge our SETTINGS in 0.05 s" in str(connection.failure)


def test_a_real_etcd_with_tls(certificates: Certificates, tmp_path: Path) -> None:
    files = certificates
    flags = [f"--cert-file={files.server_cert}", f"--key-file={files.server_key}", f"--trusted-ca-file={files.ca}"]

    class SecureEtcd(EtcdServer):
        """The harness's etcd, with TLS towards clients."""

        def arguments(self) -> list[str]:
            arguments = [text for text in super().arguments() if "-client-urls=" not in text]
            url = f"https://{self.endpoint}"
            metrics = f"--listen-metrics-urls=http://127.0.0.1:{self.metrics_port}"
            return [*arguments, f"--listen-client-urls={url}", f"--advertise-client-urls={url}", metrics]

        metrics_port = free_port()

        @property
        def url(self) -> str:
            return f"http://127.0.0.1:{self.metrics_port}"

    async def story(endpoint: str) -> None:
        mutual = client_context(files.client_cert, files.client_key, files.ca)
        connection = await connect(parse_endpoint(endpoint), mutual)
        answer, _ = await call_unary(connection, STATUS, b"", timeout_s=5)
        assert answer
        connection.close()
        assert "use https://" in await refused(f"http://{endpoint}", mutual)
        assert "--cert and --key" in await refused(f"https://{endpoint}", client_context(cacert=files.ca))
        assert "use etcd's client port" in await refused(f"127.0.0.1:{SecureEtcd.metrics_port}")

    with SecureEtcd(extra=[*flags, "--client-cert-auth"], directory=tmp_path) as etcd:
        run(story(etcd.endpoint))
