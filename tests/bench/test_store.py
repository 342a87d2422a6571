"""The store's benchmark measures servers that hold all keys, and its tables show the figures."""

from __future__ import annotations

import pytest

from tests.bench import store
from tests.etcd.binaries import current

KEYS = 300


@pytest.mark.parametrize("name", ["etcd", "store", "store, in memory"])
def test_each_server_is_measured_with_its_keys_loaded(name: str) -> None:
    figures: store.Results = {name: {}}
    kind = store.KINDS[name]
    with store.filled(kind, current(), KEYS, figures[name]) as server:
        figures[name] |= store.read(server, KEYS)
        with pytest.raises(AssertionError, match="300 keys of 301"):
            store.read(server, KEYS + 1)
        target = store.target_of(name, server)
        assert target.memory_mib() > 5
        assert target.cpu_s() > 0
    assert ("start_s" in figures[name]) is kind.durable


def test_tables_have_a_dash_for_missing_figures() -> None:
    results: store.Results = {
        "etcd": {"start_s": 0.25, "memory_mib": 99.6, "put-1 events_s": 1234.5, "put-1 lost": 0.0},
        "store": {"count_ms": 1.25, "paced cpu_us": 10.5, "paced lost": 2.0},
    }
    lines = store.markdown_of(results, 1000).splitlines()
    assert lines[0].startswith("| 1,000 keys | start s |")
    assert "| etcd | 0.25 | 100 | - | - | - | - |" in lines
    assert "| **put-1** | etcd | 1,234 | - | - | 0 |" in lines
    assert "|  | store | - | - | - | - |" in lines
    assert lines[-1] == "| store | 10.5 | - | 2 |"
