"""SIGHUP: read the settings again and apply those that are safe to change while clients are connected.

Limits, times and log settings are safe, and so are etcd's endpoints, if they belong to the same cluster. Listen
addresses are not: the log names such a change, which needs a restart. Certificates need no signal, because each
handshake checks their files for changes. Invalid settings change nothing at all.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace

from proxy import logs
from proxy.config.knobs import Settings, knobs, reloaded
from proxy.errors import Failed

log = logs.logger("reload")


def hangups_come() -> None:
    """Let SIGHUP come from now on; one that came during the start (`cli.apart`) was held back and comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


class Reloading:
    """The settings in force, and their replacement."""

    def __init__(self, settings: Settings, apply: Callable[[Settings], None]) -> None:
        self.settings = settings
        self._apply = apply
        self._stopped = False
        self._reading: asyncio.Task[None] | None = None
        self._again = False
        """Another signal came while the settings were read."""

    def stop(self) -> None:
        """Reload nothing from now on: the proxy drains."""
        self._stopped = True

    def reload_in_thread(self, read: Callable[[], tuple[Settings, list[str]]]) -> None:
        """As `reload`, but read in another thread: that loads the command line's modules, which takes 40 ms.

        The settings are read again after a call that comes meanwhile.
        """
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read_and_reload(read), name="reload")
        else:
            self._again = True

    async def _read_and_reload(self, read: Callable[[], tuple[Settings, list[str]]]) -> None:
        try:
            wanted = True
            while wanted:
                self._again = False
                reading = asyncio.get_running_loop().run_in_executor(None, read)
                await asyncio.wait([reading])
                self.reload(reading.result)
                wanted = self._again
        finally:
            self._reading = None

    def reload(self, read: Callable[[], tuple[Settings, list[str]]]) -> None:
        """Read the settings and apply them. Never raises: after an error the proxy keeps its settings."""
        if self._stopped:
            log.warning("the proxy stops; settings are not reloaded")
            return
        try:
            wanted, notes = read()
        except Failed as error:
            log.error("invalid settings; nothing changed", problem="; ".join(str(error).splitlines()))
            return
        except OSError as error:
            # No file descriptor or memory is left.
            log.error("cannot read the settings; nothing changed", problem=str(error))
            return
        except Exception as error:
            # The program on disk is another one since an upgrade, and a module that is loaded only now fails.
            problem = f"{type(error).__name__}: {error}; if the program was upgraded, restart it"
            log.error("cannot read the settings; nothing changed", problem=problem)
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
        taken = sorted((changed & reloaded()) - changed_store)
        waiting = sorted((changed - reloaded()) | changed_store)
        self.settings = merged(self.settings, wanted)
        # Even if nothing has changed: endpoints that were refused may be good now.
        self._apply(self.settings)
        log.info("settings reloaded", changed=taken)
        if waiting:
            log.warning("some changes need a restart", settings=waiting)


def _with_endpoints(settings: Settings, endpoints: list[str]) -> Settings:
    upstream = replace(settings.upstream, endpoints=endpoints)
    return replace(settings, upstream=upstream)


def changes(old: Settings, new: Settings) -> set[str]:
    """Return the settings, as `table.key`, that differ."""
    return {knob.path for knob in knobs() if knob.of(old) != knob.of(new)}


def merged(old: Settings, new: Settings) -> Settings:
    """Return the new values of all reloadable settings, and the old ones of all others."""
    values: dict[str, dict[str, object]] = {}
    for knob in knobs():
        if knob.about.reloaded:
            values.setdefault(knob.table, {})[knob.key] = knob.of(new)
    return replace(old, **{table: replace(getattr(old, table), **keys) for table, keys in values.items()})
