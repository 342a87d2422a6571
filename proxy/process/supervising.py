"""`--workers`: a parent that starts, watches, restarts and stops the processes of one proxy.

One *hub* holds the upstream watches, and N *workers* serve clients. Each of them is the proxy as it is with one process
(`serving.serve`): the hub listens on a private unix socket, and a worker takes its watches from there
(`--watch-endpoints`), so that no further protocol is needed. The parent accepts the clients' connections and passes
each to the worker that has the fewest (`distributor.py`).

The parent has no event loop: it forks, and a process with a running loop must not. Processes are forked after all
modules are loaded, so they share that memory and start within milliseconds. What to do and when is decided by
`supervision.py`; here are the processes, signals and sockets. Parent and process share a socket pair, as `child.py`
describes. If the parent dies, the kernel kills them all, also one that hangs, so that their addresses are free again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import gc
import os
import pickle
import random
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Final, NoReturn

import msgspec

from proxy import logs
from proxy.admin.aggregate import (
    AllProcesses,
    Heartbeat,
    ParentMessage,
    ProcessReport,
    with_ended,
)
from proxy.config.knobs import Settings, limits
from proxy.config.values import Address, parse_listen_address, parse_metrics_address
from proxy.errors import FAILURE, WRONG_REQUEST, Failed, complain, flush_streams
from proxy.listening.listener import BACKLOG
from proxy.listening.sockets import Listening, bind
from proxy.process import serving, shares
from proxy.process.addresses import cannot_listen
from proxy.process.child import ChildReady, end_with
from proxy.process.distributor import ConnectionDistributor
from proxy.process.endpoints import EndpointLists, EndpointsDecision, ExaminationResult
from proxy.process.member import ProcessPlace
from proxy.process.reloading import Reloading, hangups_come
from proxy.process.service_manager import ServiceManager
from proxy.process.supervision import HUB, LOOK_S_MAX, KillProcess, Phase, StartProcess, StopProcess, Supervision
from proxy.version import process_identity
from upstream.watch_route import new_id

PASSED_ON_S: Final = 2.5
"""How often the hub gets the reports of all processes."""

IN_USE_S_MAX: Final = 2.0
"""How long a start waits for an address in use: processes of a parent that was killed may still be ending."""

STOPS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
"""The signals that stop a process."""

log = logs.logger("workers")


def run(settings: Settings, notes: list[str], parent_fd: int | None, read_again: serving.ReadAgain) -> int:
    """Run the proxy with several processes until a signal; return the exit code. Raises Failed."""
    if not (settings.upstream.endpoints or settings.upstream.discovery_srv):
        raise Failed("--workers needs --endpoints; run `watchmux store` for a store of its own", WRONG_REQUEST)
    logs.name_process("parent")
    logs.configure(settings.log.log_level, settings.log.log_format)
    for note in notes:
        log.warning(note)
    with contextlib.ExitStack() as stack:
        return _Supervisor(settings, parent_fd, stack).run(read_again)


def _private_socket() -> tuple[Listening, str]:
    """Listen on a unix socket for the processes of this program; return it and the path to connect to.

    Its file is removed at once, so that nothing stays when this process is killed. The path leads to the inherited
    descriptor of the file: as before only the same user can connect, unlike to an abstract socket.
    """
    directory = tempfile.mkdtemp(prefix="watchmux-")
    try:
        path = os.path.join(directory, HUB)
        listening = bind("", 0, path, BACKLOG)
        return listening, f"/proc/self/fd/{os.open(path, os.O_PATH)}"
    finally:
        shutil.rmtree(directory)


@dataclass(slots=True)
class _Process:
    """A running process, seen from the parent."""

    pid: int
    socket: socket.socket
    received: bytes = b""
    unsent: bytes = b""
    """Orders that it has not taken yet: its event loop is busy."""
    ready: ChildReady | None = None
    report: msgspec.Raw | None = None

    def send(self, order: ParentMessage) -> None:
        """Send an order, what it does not take now at the next `flush`: the parent does not wait."""
        self.unsent += msgspec.json.encode(order) + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what it takes now."""
        with contextlib.suppress(OSError):
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent, socket.MSG_DONTWAIT) :]


class _Supervisor:
    """See the module."""

    def __init__(self, settings: Settings, parent_fd: int | None, stack: contextlib.ExitStack) -> None:
        self._settings = settings
        self._workers = shares.count(settings.listener.workers)
        # All processes use the same answer of DNS, and one that is restarted does not need DNS.
        found = asyncio.run(serving.discovered(settings)).upstream
        self._decision = EndpointsDecision(EndpointLists(found.endpoints, found.watch_endpoints))
        self._whole_id = new_id()
        self._cluster_id = 0
        self._state = Supervision(self._workers, random.random, settings.listener.drain_s)
        self._processes: dict[str, _Process] = {}
        # By name, the counters of processes that have ended.
        self._ended: dict[str, ProcessReport] = {}
        self._ended_is_new = False
        self._since = time.monotonic()
        self._code = 0
        self._announced = False
        self._passed_on_at = 0.0
        self._alive_at = 0.0
        self._manager = ServiceManager(lambda: self._state.hung, os.environ)
        self._own_parent = None if parent_fd is None else socket.socket(fileno=parent_fd)
        self._address = parse_listen_address(settings.listener.listen_addr)
        self._clients = self._bind(self._address, "--listen-addr")
        stack.callback(self._clients.remove_file)
        self._hub, self._hub_path = _private_socket()
        self._metrics: Listening | None = None
        if settings.admin.metrics_addr:
            self._metrics = self._bind(parse_metrics_address(settings.admin.metrics_addr), "--metrics-addr")
        self._selector = selectors.DefaultSelector()
        self._distributor = ConnectionDistributor(self._clients, self._selector, self._state.takers)
        # Signals that have come; and how many of them asked for a stop.
        self._signals: deque[int] = deque()
        self._stops = 0
        self._woken, self._waking = socket.socketpair()
        for each in (self._woken, self._waking):
            each.setblocking(False)

    @staticmethod
    def _bind(address: Address, flag: str) -> Listening:
        deadline = time.monotonic() + IN_USE_S_MAX
        while True:
            try:
                return bind(address.host, address.port, address.path, BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise cannot_listen(address, flag, error) from None
            time.sleep(0.05)

    def run(self, read_again: serving.ReadAgain) -> int:
        """Supervise until all processes are gone; return the exit code."""
        reloading = Reloading(self._settings, self._apply)
        # Only noted: a signal may come in the middle of anything.
        for number in (*STOPS, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        hangups_come()
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain_wakeups)
        if self._own_parent is not None:
            self._selector.register(self._own_parent, selectors.EVENT_READ, self._own_parent_said)
        gc.collect()
        gc.freeze()
        while self._state.phase is not Phase.GONE:
            self._follow_signals(reloading, read_again)
            self._act()
            if self._state.phase is Phase.RUN:
                self._distributor.arrange(time.monotonic())
            else:
                self._distributor.stop()
            for key, _ in self._selector.select(self._timeout_s()):
                key.data()
            self._reap()
            self._notify()
        log.info("stopped")
        return self._code

    def _follow_signals(self, reloading: Reloading, read_again: serving.ReadAgain) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number != signal.SIGHUP:
                self._stops += 1
                self._stop(again=self._stops > 1)
                reloading.stop()
            elif signal.SIGHUP not in self._signals:
                reloading.reload(read_again)

    def _timeout_s(self) -> float:
        alive_at = self._alive_at if self._announced and self._manager.interval_s else None
        deadlines = (self._state.next_deadline(), self._distributor.again_at, alive_at)
        now = time.monotonic()
        return min([LOOK_S_MAX, *(max(0.0, deadline - now) for deadline in deadlines if deadline is not None)])

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def _own_parent_said(self) -> None:
        assert self._own_parent is not None
        if not self._own_parent.recv(4096):
            self._selector.unregister(self._own_parent)
            self._stop()

    def _stop(self, again: bool = False) -> None:
        if self._state.phase is Phase.RUN:
            log.info("draining", workers=self._workers)
            self._manager.stopping()
        self._state.stop(time.monotonic())
        if again:
            log.warning("second signal: stopping at once")
            for name in self._processes:
                self._signal(name, signal.SIGTERM)

    def _act(self) -> None:
        for action in self._state.due(time.monotonic()):
            if isinstance(action, StartProcess):
                self._start(action.name)
            elif isinstance(action, StopProcess):
                self._signal(action.name, signal.SIGTERM)
            elif isinstance(action, KillProcess):
                log.error("a process hangs, or did not stop in time; it is killed", name=action.name)
                self._signal(action.name, signal.SIGKILL)

    def _signal(self, name: str, number: int) -> None:
        if name in self._processes:
            os.kill(self._processes[name].pid, number)

    # processes

    def _start(self, name: str) -> None:
        try:
            process = self._fork(name)
        except OSError as error:
            log.error("cannot start a process; it is tried again", name=name, problem=error.strerror)
            self._state.not_started(name, time.monotonic())
            return
        self._processes[name] = process
        self._selector.register(process.socket, selectors.EVENT_READ, lambda: self._read(name))
        self._state.started(name, time.monotonic())
        if name == HUB:
            self._examine()
        starts = self._state.processes[name].starts
        if starts > 1:
            log.warning("process restarted", name=name, pid=process.pid, starts=starts)

    def _fork(self, name: str) -> _Process:
        """Start a process. Raises OSError."""
        with contextlib.ExitStack() as failed, contextlib.ExitStack() as done:
            ours, theirs = socket.socketpair()
            failed.callback(ours.close)
            done.callback(theirs.close)
            if name == HUB:
                listening = self._hub
            else:
                listening = self._distributor.started(name)
                done.callback(listening.sockets[0].close)
                failed.callback(self._distributor.ended, name)
            parent = os.getpid()
            # One that comes to the new process before it has its own handlers must not be lost in those of the parent.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            done.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            pid = os.fork()
            if not pid:
                end_with(parent)
                ours.close()
                self._become(name, theirs, listening)
            failed.pop_all()
            return _Process(pid, ours)

    def _become(self, name: str, theirs: socket.socket, listening: Listening) -> NoReturn:
        """Be a process from now on. Does not return."""
        code = FAILURE
        try:
            # The others' sockets: a process learns that the parent is gone when no copy of its socket is left.
            for process in self._processes.values():
                process.socket.close()
            self._distributor.forget()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            # One that is sent to all processes by name is the parent's, which reads the settings once.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            self._selector.close()
            for each in (self._woken, self._waking, self._own_parent):
                if each is not None:
                    each.close()
            # Ctrl-C reaches the parent only, which stops its processes in their order.
            os.setsid()
            code = self._serve(name, theirs.detach(), listening)
        except Failed as error:
            complain(str(error))
            code = error.code
        except BaseException:
            log.exception("process failed", name=name)
        finally:
            flush_streams()
            os._exit(code)

    def _serve(self, name: str, fd: int, listening: Listening) -> int:
        import uvloop

        logs.name_process(name)
        if name == HUB:
            whole = AllProcesses(self._reports(), self._ended, self._since, limits(self._settings))
            place = ProcessPlace(name, listening, metrics=self._metrics, whole=whole)
        else:
            place = ProcessPlace(name, listening, hub=f"http+unix://{self._hub_path}")
        place = replace(place, whole_id=self._whole_id, cluster_id=self._cluster_id)
        return uvloop.run(serving.serve(self._part(name), [], fd, None, place))

    def _part(self, name: str) -> Settings:
        """Return the settings of a process, with the endpoints in force."""
        calls, watches = self._decision.in_force
        upstream = replace(self._settings.upstream, discovery_srv="", endpoints=calls, watch_endpoints=watches)
        settings = replace(self._settings, upstream=upstream)
        if name == HUB:
            return shares.hub_settings(settings, self._workers, self._hub_path)
        return shares.worker_settings(settings, self._workers, f"http+unix://{self._hub_path}")

    def _reap(self) -> None:
        for name, process in tuple(self._processes.items()):
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if not pid:
                continue
            # What it has reported last.
            while self._read(name):
                pass
            self._unregister(process)
            process.socket.close()
            if name != HUB:
                self._distributor.ended(name)
            del self._processes[name]
            if process.report is not None:
                report = msgspec.json.decode(process.report, type=ProcessReport)
                self._ended[name] = with_ended(self._ended.get(name), report)
                self._ended_is_new = True
            code = os.waitstatus_to_exitcode(status)
            running = self._state.phase is Phase.RUN
            self._state.ended(name, time.monotonic())
            if self._state.failed and not self._code:
                self._code = code or FAILURE
            elif running:
                log.error("process ended", name=name, exit_code=code)

    def _read(self, name: str) -> bool:
        """Take what a process reports; return whether there was something."""
        process = self._processes[name]
        try:
            data = process.socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionError):
            return False
        if not data:
            # It is about to end; `_reap` removes it.
            self._unregister(process)
            return False
        *lines, process.received = (process.received + data).split(b"\n")
        for line in lines:
            if process.ready is None:
                process.ready = msgspec.json.decode(line, type=ChildReady)
                self._state.reported(name, time.monotonic(), problem="starting")
                continue
            beat = msgspec.json.decode(line, type=Heartbeat)
            process.report = beat.report
            if name == HUB:
                self._cluster_id = beat.cluster_id or self._cluster_id
                if beat.examined is not None:
                    self._decide(beat.examined)
            self._state.reported(name, time.monotonic(), problem=beat.problem, hung=beat.hung)
            if name != HUB:
                self._distributor.reported(name, beat.open, beat.taken, beat.load, beat.open_max)
        return True

    def _unregister(self, process: _Process) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(process.socket)

    # what others learn

    def _notify(self) -> None:
        now = time.monotonic()
        if self._state.was_ready and not self._announced:
            self._announce()
        if self._announced and self._manager.interval_s and now >= self._alive_at:
            self._alive_at = now + self._manager.interval_s
            self._manager.alive()
        for process in self._processes.values():
            process.flush()
        hub = self._processes.get(HUB)
        if hub is not None and hub.ready is not None and not hub.unsent and now >= self._passed_on_at + PASSED_ON_S:
            self._passed_on_at = now
            hub.send(ParentMessage(reports=self._reports(), ended=self._ended if self._ended_is_new else None))
            self._ended_is_new = False

    def _reports(self) -> list[msgspec.Raw]:
        """Return the newest report of each process, the hub first."""
        found = sorted(self._processes.items(), key=lambda each: each[0] != HUB)
        return [process.report for _, process in found if process.report is not None]

    def _announce(self) -> None:
        self._announced = True
        address = self._address._replace(port=self._clients.port)
        metrics = ""
        if self._metrics is not None:
            host = parse_metrics_address(self._settings.admin.metrics_addr).host
            metrics = str(Address(host, self._metrics.port))
        log.info(
            "serving",
            **process_identity(),
            address=self._settings.listener.advertise_client_url or str(address),
            endpoints=self._decision.in_force.calls,
            workers=self._workers,
            **({"metrics": f"http://{metrics}/metrics"} if metrics else {}),
        )
        self._manager.ready()
        if self._own_parent is not None:
            self._own_parent.sendall(msgspec.json.encode(ChildReady(address=str(address), metrics=metrics)) + b"\n")

    def _apply(self, settings: Settings) -> None:
        """Pass changed settings on, and use them for processes that start later."""
        self._settings = settings
        self._state.drain_s = settings.listener.drain_s
        logs.configure(settings.log.log_level, settings.log.log_format)
        self._pass_on()
        self._decision.want(serving.wanted_endpoints(settings, self._decision.in_force))
        self._examine()

    def _pass_on(self) -> None:
        """Send all processes the settings and endpoints in force."""
        for name, process in self._processes.items():
            theirs = base64.b64encode(pickle.dumps(self._part(name))).decode()
            process.send(ParentMessage(settings=theirs, limits=limits(self._settings)))

    def _examine(self) -> None:
        """Let the hub examine new endpoints, if there are some."""
        if self._decision.pending is not None and HUB in self._processes:
            self._processes[HUB].send(ParentMessage(examine=self._decision.pending))

    def _decide(self, result: ExaminationResult) -> None:
        endpoints = self._decision.examined(result)
        if endpoints is not None and self._state.phase is Phase.RUN:
            serving.report_endpoints(endpoints, result.problem)
            if not result.problem:
                self._pass_on()
