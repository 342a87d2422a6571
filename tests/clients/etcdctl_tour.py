"""A tour of etcdctl's commands: a table of steps, run against any endpoint and recorded.

The same tour must print the same against etcd itself and through the proxy, except for values that differ between any
two clusters: ids, ports, sizes, times, the raft index.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.waiting import until


@dataclass(frozen=True)
class Run:
    """A command that ends by itself. The player replaces `LEASE` and `FILE` in its arguments."""

    arguments: str
    stdin: str | None = None


@dataclass(frozen=True)
class Follow:
    """A command that does not end by itself.

    Once etcd counts its `watches` and `first` lines were printed, `during` is run; after `lines` lines the command is
    interrupted.
    """

    arguments: str
    lines: int
    during: tuple[Run, ...] = ()
    stdin: str | None = None
    watches: int = 0
    first: int = 0
    each: int = 0
    """Lines to wait for after each step of `during`: the watches of one etcdctl print concurrently."""


KEYS = (
    Run("put foo bar"),
    Run("put foo baz --prev-kv"),
    Run("put foo2 two"),
    Run("get foo"),
    Run("get foo --prefix -w json"),
    Run("get foo --rev=2"),
    Run("get --from-key foo --keys-only"),
    Run("get foo --prefix --count-only -w fields"),
    Run("get foo --rev=99"),
    Run("del foo2 --prev-kv"),
    Run("del nothing"),
    Run("put"),
    Run("txn", 'mod("foo") > "0"\n\nput foo changed\nget foo\n\nget foo\n\n'),
    Run("txn", 'value("foo") = "no"\n\nput foo never\n\nget foo\nput other 1\n\n'),
    Run("txn", "\nput same 1\nput same 2\n\n\n"),
)
WATCHES = (
    Follow("watch foo", 9, (Run("put foo w1"), Run("put foox no"), Run("del foo"), Run("put foo w2")), watches=1),
    Follow("watch foo --prefix", 6, (Run("put foo1 a"), Run("put foo2 b")), watches=1),
    Follow("watch foo --rev=2", 15, watches=1),
    Follow("watch foo --rev=3 --prev-kv", 18, watches=1),
    Follow("watch foo foo9 --prev-kv", 8, (Run("put foo5 a"), Run("put foo5 b")), watches=1),
    Follow("watch foo -w json", 2, (Run("put foo j1"), Run("del foo")), watches=1),
    Follow("watch foo --rev=999999", 0, watches=1),
    Follow(
        "watch -i",
        8,
        (Run("put i1 a"), Run("put i2 b")),
        "watch i1\nwatch i2 --prefix\nprogress\n",
        watches=2,
        first=2,
        each=3,
    ),
    Run("compaction 5"),
    Follow("watch foo --rev=2", 2),
    Run("get foo --rev=2"),
)
LEASES = (
    Run("lease grant 100"),
    Run("put leased v --lease=LEASE"),
    Run("lease timetolive LEASE --keys"),
    Run("lease keep-alive --once LEASE"),
    Follow("lease keep-alive LEASE", 1),
    Run("lease list"),
    Run("lease revoke LEASE"),
    Run("get leased"),
    Run("lease revoke 7b"),
    Run("lock tour -- echo held"),
    Follow("elect tour-election one", 2),
)
CLUSTER = (
    Run("member list"),
    Run("member list -w json"),
    Run("endpoint health"),
    Run("endpoint status"),
    Run("endpoint hashkv"),
    Run("alarm list"),
    Run("defrag"),
    Run("check perf --load=nonsense"),
    Run("snapshot save FILE"),
    Run("move-leader 1"),
    Run("member remove 1"),
)
USERS = (
    Run("user add root:rootpw"),
    Run("user grant-role root root"),
    Run("role add reader"),
    Run("role grant-permission reader read pub --prefix=true"),
    Run("role get reader"),
    Run("user add alice:alicepw"),
    Run("user grant-role alice reader"),
    Run("user get alice"),
    Run("user list"),
    Run("role list"),
    Run("put pub1 x"),
    Run("auth enable"),
    Run("get pub1"),
    Run("--user=alice:alicepw get pub1"),
    Run("--user=alice:wrong get pub1"),
    Run("--user=alice:alicepw put pub1 y"),
    Run("--user=root:rootpw put pub1 y"),
    Follow("--user=alice:alicepw watch pub --prefix", 3, (Run("--user=root:rootpw put pub2 z"),), watches=1),
    Follow("--user=alice:alicepw watch secret", 2),
    Follow("watch pub1", 2),
    Run("--user=root:rootpw user delete alice"),
    Run("--user=root:rootpw auth disable"),
    Run("role delete reader"),
)
TOUR: dict[str, tuple[Run | Follow, ...]] = {
    "keys": KEYS,
    "watches": KEYS[:3] + WATCHES,
    "leases": LEASES,
    "cluster": CLUSTER,
    "users": USERS,
}

_FREE = (
    (re.compile(r'"(cluster_id|member_id|ID|leader|lease|raft_term|raftTerm|hash|dbSize\w*|raft\w+)":\d+'), r'"\1":N'),
    (re.compile(r'"(ClusterID|MemberID|RaftTerm)" : \d+'), r'"\1" : N'),
    # Of 64 random bits, printed without leading zeros; after the decimal ones, which may have so few digits, too.
    (re.compile(r"\b[0-9a-f]{12,16}\b"), "ID"),
    (re.compile(r"127\.0\.0\.1:\d+"), "HOST:PORT"),
    (re.compile(r"took = [\d.]+\w+|took [\d.]+\w+|[\d.]+ (µ|m|n)?s(econds ago)?"), "TIME"),
    (re.compile(r"\d{4}[-/]\d\d[-/]\d\d[ T][\d:.]+(Z|[+-]\d+)?"), "DATE"),
    (re.compile(r'"(ts|caller|target|endpoint|took|path|size|saved-at)":("[^"]*"|[\d.]+)'), r'"\1":X'),
    (re.compile(r"/\S*tour\S*\.db\S*"), "FILE"),
    (re.compile(r"[\d.]+ [kM]B\b"), "SIZE"),
    (re.compile(r"remaining\(\d+s\)"), "remaining"),
    (re.compile(r"(ID, [\d.]+, SIZE, (?:true|false), (?:true|false), )\d+, \d+, \d+"), r"\1N"),
    (re.compile(r"^.*HOST:PORT, \d+$", re.MULTILINE), "HASHKV"),
)


def neutral(text: str) -> str:
    """Replace values that may differ between two clusters by placeholders."""
    for pattern, word in _FREE:
        text = pattern.sub(word, text)
    return text


@dataclass
class Player:
    """Runs steps with one etcdctl against one endpoint and records the output."""

    etcdctl: Path
    endpoint: str
    watchers: Callable[[], int]
    directory: Path
    lease: str = ""
    record: list[str] = field(default_factory=list)
    options: tuple[str, ...] = ()
    """Further options of etcdctl, such as --cacert."""

    def _command(self, arguments: str) -> list[str]:
        words = arguments.replace("LEASE", self.lease).replace("FILE", str(self.directory / "tour.db")).split(" ")
        return [str(self.etcdctl), f"--endpoints={self.endpoint}", *self.options, *words]

    def _run(self, step: Run) -> None:
        environment = {**os.environ, "ETCDCTL_API": "3"}
        done = subprocess.run(
            self._command(step.arguments),
            capture_output=True,
            text=True,
            timeout=40,
            env=environment,
            input=step.stdin or "",
        )
        granted = re.match(r"lease (\S+) granted", done.stdout)
        if granted:
            self.lease = granted[1]
        self.record.append(neutral(f"$ {step.arguments}\n{done.returncode}\n{done.stdout}{done.stderr}"))

    @staticmethod
    def _lines(lines: list[str], count: int, what: str) -> None:
        until(lambda: len(lines) >= count, f"what {what} brings: {lines}")

    def _follow(self, step: Follow) -> None:
        before = self.watchers()
        process = subprocess.Popen(
            self._command(step.arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "ETCDCTL_API": "3"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        try:
            if step.stdin:
                process.stdin.write(step.stdin)
                process.stdin.flush()
            if step.watches:
                until(lambda: self.watchers() >= before + step.watches, f"{step.arguments} to be registered")
            self._lines(lines, step.first, step.arguments)
            for count, inner in enumerate(step.during, 1):
                self._run(inner)
                if step.each:
                    self._lines(lines, step.first + count * step.each, inner.arguments)
            until(
                lambda: len(lines) >= step.lines or process.poll() is not None, f"output of {step.arguments}: {lines}"
            )
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(20)
            process.stdin.close()
            reader.join(20)
            process.stdout.close()
        self.record.append(neutral(f"$ {step.arguments}\n{''.join(lines)}"))
        until(lambda: self.watchers() <= before, f"{step.arguments} to leave")

    def play(self, steps: tuple[Run | Follow, ...]) -> list[str]:
        """Run `steps` in order and return the output of each, with placeholders."""
        for step in steps:
            if isinstance(step, Run):
                self._run(step)
            else:
                self._follow(step)
        return self.record
