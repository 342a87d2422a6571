"""Every attack while a well-behaved client watches: the attacker is cut off, and the client gets every event."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest

from proxy.listening.settings import ListenerSettings
from tests.e2e import attacks
from tests.e2e.attacks import ATTACKS, WATCHED
from tests.e2e.running import served
from tests.etcd.server import EtcdServer
from tests.waiting import until_async


@pytest.mark.parametrize("name", ATTACKS)
async def test_other_clients_are_served_during_each_attack(
    etcd: EtcdServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "HOLD_S", 0.5)
    attack = ATTACKS[name]
    settings = ListenerSettings(first_bytes_timeout_s=0.5, reason_s=0.1)
    # A fifth of the usual limit, and of the time that such an attack takes here.
    settings = replace(settings, http2=replace(settings.http2, resets_max=2_000))
    async with served(etcd, listener=settings) as (
        proxy,
        store,
        client,
    ):
        stream = await client.open_watch(WATCHED)
        under_attack = asyncio.ensure_future(attack.run(proxy.port))
        written: list[bytes] = []
        while not under_attack.done() or not written:
            written.append(b"%d" % len(written))
            await store.put(WATCHED, written[-1])
            await until_async(lambda: len(stream.values) == len(written), "the event")
        assert re.fullmatch(attack.wants, await under_attack)
        assert stream.values == written
        await until_async(lambda: len(proxy.listener.connections) == 1, "the attacker to be gone")
        await until_async(lambda: proxy.engine.core.stats.sessions == 1, "its sessions to be gone")
        cut_off = int(attack.wants.startswith(attacks.CALM))
        assert proxy.listener.stats.failed == cut_off
        assert proxy.listener.stats.cut_off.total() == cut_off
