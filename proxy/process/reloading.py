"""SIGHUP: read the settings again and apply those that are safe to change while clients are connected.

Limits, times and log settings are safe, and so are etcd's endpoints, if they belong to the same cluster. Listen
addresses are not: the log names such a change, which needs a restart. Certificates need no signal, because each
handshake checks their files for changes. Invalid settings change nothing at all.
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
"""Settings that a running proxy applies. --max-concurrent-streams is announced to new connections only."""


class Reloading:
    """The settings in force, and their replacement."""

    def __init__(self, settings: Settings, apply: Callable[[Settings], None]) -> None:
        self.settings = settings
        self._apply = apply

    def reload(self, read: Callable[[], tuple[Settings, list[str]]]) -> None:
        """Read the settings and apply them. Never raises: after an error the proxy keeps its settings."""
        try:
            wanted, notes = read()
        except Failed as error:
            log.error("invalid settings; nothing changed", problem=str(error))
            return
        for note in notes:
            log.warning(note)
        changed = changes(self.settings, wanted)
        if bool(self.settings.upstream.endpoints) != bool(wanted.upstream.endpoints):
            # From or to the bundled store, a process that is started only together with the proxy.
            wanted = _with_endpoints(wanted, self.settings.upstream.endpoints)
            changed_store = {"upstream.endpoints"}
        else:
            changed_store = set()
        taken = sorted((changed & RELOADED) - changed_store)
        waiting = sorted((changed - RELOADED) | changed_store)
        self.settings = merged(self.settings, wanted)
        if taken:
            self._apply(self.settings)
        log.info("settings reloaded", changed=taken)
        if waiting:
            log.warning("some changes need a restart", settings=waiting)


def _with_endpoints(settings: Settings, endpoints: list[str]) -> Settings:
    upstream = replace(settings.upstream, endpoints=endpoints)
    return replace(settings, upstream=upstream)


def changes(old: Settings, new: Settings) -> set[str]:
    """Return the settings, as `table.key`, that differ."""
    return {knob.path for knob in knobs() if _value(old, knob.path) != _value(new, knob.path)}


def merged(old: Settings, new: Settings) -> Settings:
    """Return the new values of all reloadable settings, and the old ones of all others."""
    tables = {}
    for table in fields(old):
        before, after = getattr(old, table.name), getattr(new, table.name)
        reloaded = [field.name for field in fields(before) if f"{table.name}.{field.name}" in RELOADED]
        tables[table.name] = replace(before, **{name: getattr(after, name) for name in reloaded})
    return replace(old, **tables)


def _value(settings: Settings, path: str) -> object:
    table, _, key = path.partition(".")
    return getattr(getattr(settings, table), key)
