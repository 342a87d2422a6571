"""SIGHUP: read the settings again and go by them, as far as that is safe while clients are connected.

Safe is what bounds or tells: limits, times, the log; and where etcd is, if it is the same cluster. Addresses to listen
on are not: a change of those is named in the log and waits for a restart. Certificates need no signal, as their files
are looked at with each handshake. Settings that cannot be used change nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from proxy import logs
from proxy.config.knobs import Settings, knobs
from proxy.errors import Failed

log = logs.logger("reload")

RELOADED = frozenset(
    {
        "listener.connections_max",
        "listener.drain_s",
        "listener.grpc_keepalive_interval_s",
        "listener.grpc_keepalive_min_time_s",
        "listener.grpc_keepalive_timeout_s",
        "listener.max_concurrent_streams",
        "listener.requests_waiting_bytes_max",
        "listener.sessions_per_connection_max",
        "log.log_format",
        "log.log_level",
        "watch.history_age_s",
        "watch.history_bytes_max",
        "watch.history_bytes_total_max",
        "watch.history_linger_s",
        "watch.history_revisions_max",
        "watch.lagging_age_s_max",
        "watch.linger_s",
        "watch.parked_max",
        "watch.queue_max",
        "watch.trunks_max",
        "watch.watches_max",
        "watch.watches_per_session_max",
        "upstream.call_wait_s",
        "upstream.endpoints",
    }
)
"""Knobs that a running proxy takes. --max-concurrent-streams is told to new connections only."""


class Reloading:
    """The settings in force, and how others take their place."""

    def __init__(self, settings: Settings, apply: Callable[[Settings], None]) -> None:
        self.settings = settings
        self._apply = apply

    def reload(self, read: Callable[[], tuple[Settings, list[str]]]) -> None:
        """Read the settings and go by them; never raises, since the proxy works as it is."""
        try:
            wanted, notes = read()
        except Failed as error:
            log.error("the settings cannot be used; nothing is changed", problem=str(error))
            return
        for note in notes:
            log.warning(note)
        changed = changes(self.settings, wanted)
        if bool(self.settings.upstream.endpoints) != bool(wanted.upstream.endpoints):
            # From or to the bundled store, which is a process that is started with the proxy.
            wanted = _with_endpoints(wanted, self.settings.upstream.endpoints)
            changed_store = {"upstream.endpoints"}
        else:
            changed_store = set()
        taken = sorted((changed & RELOADED) - changed_store)
        waiting = sorted((changed - RELOADED) | changed_store)
        self.settings = merged(self.settings, wanted)
        if taken:
            self._apply(self.settings)
        log.info("settings read again", changed=taken)
        if waiting:
            log.warning("some changes need a restart", settings=waiting)


def _with_endpoints(settings: Settings, endpoints: list[str]) -> Settings:
    upstream = replace(settings.upstream, endpoints=endpoints)
    return replace(settings, upstream=upstream)


def changes(old: Settings, new: Settings) -> set[str]:
    """Return the knobs, as `table.key`, in which two settings differ."""
    return {knob.path for knob in knobs() if _value(old, knob.path) != _value(new, knob.path)}


def merged(old: Settings, new: Settings) -> Settings:
    """Return the new values of what can be reloaded, and the old ones of everything else."""
    tables = {}
    for table in fields(old):
        before, after = getattr(old, table.name), getattr(new, table.name)
        reloaded = [field.name for field in fields(before) if f"{table.name}.{field.name}" in RELOADED]
        tables[table.name] = replace(before, **{name: getattr(after, name) for name in reloaded})
    return replace(old, **tables)


def _value(settings: Settings, path: str) -> object:
    table, _, key = path.partition(".")
    return getattr(getattr(settings, table), key)
