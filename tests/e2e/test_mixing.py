"""Some seeds of the request fuzzer: other clients get all events, every turn is bounded, and nothing is kept."""

from __future__ import annotations

from proxy.listening.settings import ListenerSettings
from proxy.listening.turns import SHARE
from proxy.watch.service import PROGRESS_WORK
from tests.e2e.mixing import judge
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer


def test_any_mix_of_requests_is_handled_in_turns(etcd: EtcdServer) -> None:
    verdict = run(judge(etcd, 0, 8), 120)
    assert verdict.events
    assert 100 < verdict.inputs_most <= (ListenerSettings().http2.turn_work_max + SHARE) // PROGRESS_WORK + 1
