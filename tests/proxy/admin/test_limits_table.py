"""Every limit has a metric that shows that it was reached, unless there is nothing to show, and a test at its edge."""

from __future__ import annotations

import asyncio
import re
from functools import cache

from prometheus_client.parser import text_string_to_metric_families

from tests import limits_table
from tests.etcd.server import EtcdServer
from tests.limits_page import ROOT, SOURCES, limits
from tests.limits_table import NOTHING, sample
from tests.proxy.admin.test_metrics import idle_page

ROWS = [row for source in SOURCES for row in source.rows.values()]


def test_every_limit_has_a_row() -> None:
    for source in SOURCES:
        assert list(source.rows) == [field for field, _ in limits(source)], source.title


def test_a_started_proxy_exports_every_metric_of_the_table(etcd: EtcdServer) -> None:
    text, _ = asyncio.run(idle_page(etcd))
    there = {
        (found.name, frozenset(found.labels.items()))
        for family in text_string_to_metric_families(text)
        for found in family.samples
    }
    for metric in {row.metric for row in ROWS} - {NOTHING}:
        name, labels = sample(metric)
        assert (name, frozenset(labels.items())) in there, metric
        assert not labels or len(labels) == 1


def test_refused_and_closed_clients_are_counted() -> None:
    """Only limits that pace or split work have no such metric, and none of them is a maximum for clients."""
    silent = {field for source in SOURCES for field, row in source.rows.items() if row.metric == NOTHING}
    assert {field for field in silent if field.endswith("_max")} == {
        *("replay_bytes_max", "replay_turn_bytes_max", "response_bytes_max", "fragment_run_bytes_max"),
        *("replay_events_max", "replay_turn_events_max", "step_watches_max"),
        *("progress_retry_s_max", "probe_age_s_max"),
    }
    assert not silent & {"first_bytes_timeout_s", "settings_timeout_s", "keepalive_timeout_s", "idle_timeout_s"}


@cache
def found_in(path: str) -> set[str]:
    """The tests of a file."""
    return set(re.findall(r"^(?:async )?def (test_\w+)\(", (ROOT / "tests" / path).read_text(), re.MULTILINE))


def test_every_named_test_exists() -> None:
    for test in (*(row.edge for row in ROWS), *(kept.test for kept in limits_table.KEPT)):
        path, _, name = test.partition("::")
        assert name in found_in(path), test


def test_stored_data_counts_for_existing_limits() -> None:
    fields = {field for source in SOURCES for field in source.rows}
    for kept in limits_table.KEPT:
        named = set(re.findall(r"`([a-z_]+)`", kept.counts_for + kept.until))
        assert named <= fields, kept.what


def test_a_label_value_may_contain_blanks() -> None:
    assert sample('watchmux_x_total{reason="flood: header fields"}') == (
        "watchmux_x_total",
        {"reason": "flood: header fields"},
    )
