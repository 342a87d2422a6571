"""For each limit in docs/evidence/limits.md: the metric that shows that it was reached, and the test at its edge.

`python -m tests.limits_page` puts both into the page; tests/proxy/admin/test_limits_table.py checks that every limit
has its row here, that the metrics are on the page of a running proxy, and that the tests exist.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from proxy.admin.metrics import metric_at
from proxy.config.knobs import knobs

NOTHING: Final = "-"
"""No metric: the setting only defines when or in which portions something is done; it refuses and delays no one."""


class Row(NamedTuple):
    """One limit."""

    metric: str
    edge: str


def _setting(key: str, edge: str) -> Row:
    """Return the row of a setting: its metric is part of its declaration."""
    return Row(next(metric_at(knob) for knob in knobs() if knob.key == key), edge)


_REFUSED: Final = 'watchmux_limit_refusals_total{limit="%s"}'
_EVICTED: Final = 'watchmux_history_evictions_total{limit="%s"}'
_CUT_OFF: Final = 'watchmux_connections_cut_off_total{reason="%s"}'
_TIMED_OUT: Final = 'watchmux_connections_timed_out_total{limit="%s"}'
_HTTP1: Final = 'watchmux_http1_refusals_total{status="%s"}'
_NOT_KEPT: Final = 'watchmux_calls_not_kept_total{limit="%s"}'
_UPSTREAM: Final = 'watchmux_upstream_timeouts_total{limit="%s"}'
_READS: Final = 'watchmux_upstream_reads_failed_total{status="%s"}'

_HISTORY: Final = "coalesce/test_history.py::"
_JOINING: Final = "coalesce/test_joining.py::"
_PARKING: Final = "coalesce/test_parking.py::"
_REPLAY: Final = "coalesce/test_replay.py::"
_BACKFILL: Final = "coalesce/test_backfill.py::"
_ASKING: Final = "coalesce/test_progress_requests.py::"
_NOTIFYING: Final = "coalesce/test_notifying.py::"
_FLOODS: Final = "http2/test_floods.py::"
_FLOW: Final = "http2/test_flow.py::"
_ADDRESSES: Final = "proxy/listening/test_addresses.py::"
_CHECKS: Final = "proxy/auth/test_permission_checks.py::"
_HOLDING: Final = "proxy/passthrough/test_holding.py::"
_LISTENER: Final = "e2e/test_limits.py::"
_TRANSLATING: Final = "proxy/passthrough/test_translating.py::"
_UP: Final = "upstream/test_limits.py::"

CORE: Final = {
    "linger_s": Row(NOTHING, "coalesce/test_ending.py::test_a_trunk_lingers_with_its_history"),
    "history_linger_s": _setting("history_linger_s", f"{_PARKING}test_a_parked_history_is_dropped_after_its_time"),
    "parked_max": Row(_EVICTED % "parked_max", f"{_PARKING}test_the_oldest_parked_history_is_dropped_at_the_limit"),
    "history_bytes_max": _setting("history_bytes_max", f"{_HISTORY}test_a_history_is_bounded_in_bytes_and_in_batches"),
    "history_bytes_total_max": _setting(
        "history_bytes_total_max", f"{_HISTORY}test_the_total_bound_evicts_the_oldest_batch_of_all"
    ),
    "history_revisions_max": _setting(
        "history_revisions_max", f"{_HISTORY}test_a_history_is_bounded_in_bytes_and_in_batches"
    ),
    "history_age_s": _setting("history_age_s", f"{_HISTORY}test_old_batches_are_evicted_by_age"),
    "replay_bytes_max": Row(NOTHING, f"{_HISTORY}test_a_replay_is_split_between_revisions"),
    "replay_turn_bytes_max": Row(NOTHING, f"{_REPLAY}test_many_sessions_are_served_in_turns"),
    "replay_events_max": Row(NOTHING, f"{_HISTORY}test_a_replay_examines_a_bounded_number_of_events"),
    "replay_turn_events_max": Row(NOTHING, f"{_REPLAY}test_replays_with_all_events_filtered_take_turns"),
    "response_bytes_max": Row(NOTHING, f"{_BACKFILL}test_a_large_catch_up_response_is_split"),
    "fragment_bytes": Row(NOTHING, "coalesce/test_batch.py::test_a_response_is_split_from_the_limit_on"),
    "fragment_run_bytes_max": Row(NOTHING, "coalesce/test_runs.py::test_at_its_bound_a_run_ends_between_two_revisions"),
    "watches_per_session_max": _setting(
        "watches_per_session_max", f"{_JOINING}test_limits_are_refused_with_a_clear_text"
    ),
    "watches_max": _setting("watches_max", f"{_JOINING}test_limits_are_refused_with_a_clear_text"),
    "trunks_max": _setting("trunks_max", f"{_JOINING}test_limits_are_refused_with_a_clear_text"),
    "queue_max": Row(_REFUSED % "queue_max", f"{_JOINING}test_too_many_queued_requests_end_the_session"),
    "line_bytes_max": Row("watchmux_requests_waiting_bytes", f"{_JOINING}test_a_full_queue_takes_no_more_requests"),
    "step_watches_max": Row(NOTHING, f"{_JOINING}test_many_creates_are_decided_in_steps"),
    "backfills_max": _setting("backfills_max", f"{_BACKFILL}test_backfills_are_bounded_and_further_watches_are_queued"),
    "backfill_bytes_max": Row(
        "watchmux_upstream_paused_total", f"{_BACKFILL}test_memory_of_a_backfill_for_slow_sessions_is_bounded"
    ),
    "backfill_share_revisions": Row(NOTHING, f"{_BACKFILL}test_a_backfill_too_far_behind_is_not_shared"),
    "trunk_catch_up_revisions": Row(NOTHING, f"{_JOINING}test_where_a_trunk_starts"),
    "bookmark_s": Row(NOTHING, f"{_ASKING}test_quiet_trunks_renew_their_bookmarks"),
    "progress_interval_s": Row(NOTHING, f"{_ASKING}test_etcd_is_not_asked_too_often"),
    "progress_retry_s": Row(NOTHING, f"{_ASKING}test_pauses_between_repeated_requests_grow"),
    "progress_retry_s_max": Row(NOTHING, f"{_ASKING}test_pauses_between_repeated_requests_grow"),
    "progress_notify_s": Row(NOTHING, f"{_NOTIFYING}test_quiet_watches_get_progress_notifications"),
    "lagging_age_s_max": _setting("lagging_age_s_max", f"{_REPLAY}test_a_session_behind_for_too_long_is_ended"),
}

HTTP2: Final = {
    "max_streams": _setting("max_concurrent_streams", f"{_FLOODS}test_a_stream_that_reaches_a_limit_is_reported"),
    "initial_window": Row(_REFUSED % "initial_window", f"{_FLOW}test_a_stream_window_overrun_costs_the_stream"),
    "connection_window": Row(
        _CUT_OFF % "FLOW_CONTROL_ERROR", f"{_FLOW}test_a_connection_window_overrun_costs_the_connection"
    ),
    "max_frame_bytes": Row(_CUT_OFF % "FRAME_SIZE_ERROR", f"{_FLOW}test_our_frame_size_is_checked_before_buffering"),
    "header_list_bytes_max": Row(
        _REFUSED % "header_list_bytes_max",
        "http2/test_header_lists.py::test_an_oversized_header_list_keeps_the_compression_state",
    ),
    "header_table_bytes": Row(
        _CUT_OFF % "COMPRESSION_ERROR",
        "http2/test_settings.py::test_a_peer_that_shrinks_its_table_is_understood",
    ),
    "header_fields_max": Row(
        _CUT_OFF % "flood: header fields", f"{_FLOODS}test_too_many_header_fields_end_the_connection"
    ),
    "turn_work_max": Row(
        "watchmux_connections_in_turns_total", f"{_LISTENER}test_turn_work_max_spreads_input_over_turns"
    ),
    "resets_remembered": Row(NOTHING, "http2/test_ends.py::test_late_frames_of_a_forgotten_stream_are_reset_again"),
    "continuations_max": Row(
        _CUT_OFF % "flood: CONTINUATION", f"{_FLOODS}test_continuations_of_one_header_block_are_bounded"
    ),
    "resets_max": Row(_CUT_OFF % "flood: streams ended badly", f"{_FLOODS}test_a_flood_ends_the_connection"),
    "patience_s": Row(
        _CUT_OFF % "flood: streams ended badly", f"{_FLOODS}test_resets_of_streams_that_waited_are_not_a_flood"
    ),
    "pings_max": Row(_CUT_OFF % "flood: PING", f"{_FLOODS}test_a_flood_ends_the_connection"),
    "settings_max": Row(_CUT_OFF % "flood: SETTINGS", f"{_FLOODS}test_a_flood_ends_the_connection"),
    "empty_data_max": Row(_CUT_OFF % "flood: empty DATA", f"{_FLOODS}test_a_flood_ends_the_connection"),
    "tiny_updates_max": Row(_CUT_OFF % "flood: tiny WINDOW_UPDATE", f"{_FLOODS}test_a_flood_ends_the_connection"),
    "tiny_update_bytes": Row(
        _CUT_OFF % "flood: tiny WINDOW_UPDATE", f"{_FLOODS}test_window_updates_that_are_not_tiny_are_not_a_flood"
    ),
    "ignored_max": Row(_CUT_OFF % "flood: frames without effect", f"{_FLOODS}test_a_flood_ends_the_connection"),
    "paused_requests_max": Row(
        _CUT_OFF % "flood: requests without reading the answers",
        f"{_FLOODS}test_requests_of_a_peer_that_reads_nothing_are_bounded",
    ),
}

LISTENER: Final = {
    "connections_max": _setting(
        "connections_max", "proxy/listening/test_listener.py::test_connection_above_the_limit_gets_goaway"
    ),
    "first_bytes_timeout_s": Row(_TIMED_OUT % "first_bytes_timeout_s", f"{_LISTENER}test_times_of_a_connection"),
    "settings_timeout_s": Row(_TIMED_OUT % "settings_timeout_s", f"{_LISTENER}test_times_of_a_connection"),
    "keepalive_interval_s": Row(NOTHING, f"{_LISTENER}test_times_of_a_connection"),
    "keepalive_timeout_s": Row(_TIMED_OUT % "keepalive_timeout_s", f"{_LISTENER}test_times_of_a_connection"),
    "keepalive_min_s": Row(
        _CUT_OFF % "too_many_pings", "proxy/listening/test_pings.py::test_third_early_ping_is_too_many"
    ),
    "idle_timeout_s": Row(_TIMED_OUT % "idle_timeout_s", f"{_LISTENER}test_times_of_a_connection"),
    "write_buffer_bytes": Row(
        "watchmux_stalls_total", "proxy/listening/test_listener.py::test_large_output_is_not_joined_for_each_stream"
    ),
    "unread_bytes_max": Row(
        "watchmux_connections_not_read_total", f"{_LISTENER}test_unread_bytes_beyond_the_limit_pause_reading"
    ),
    "reason_s": Row(NOTHING, f"{_LISTENER}test_a_connection_stays_open_for_the_reason_to_be_read"),
    "drain_ping_s": Row(NOTHING, f"{_LISTENER}test_the_final_goaway_follows_an_unanswered_ping"),
    "leaving_per_turn": Row(
        NOTHING, "proxy/listening/test_leaving.py::test_streams_closed_at_once_are_reaped_in_turns"
    ),
}

WATCH: Final = {
    "request_bytes_max": Row(_REFUSED % "request_bytes_max", f"{_LISTENER}test_the_size_of_a_watch_request"),
    "sessions_per_connection_max": _setting(
        "sessions_per_connection_max", "e2e/test_watch.py::test_sessions_per_connection_are_limited"
    ),
    "requests_waiting_bytes_max": _setting(
        "requests_waiting_bytes_max", "proxy/listening/test_turns.py::test_waiting_requests_are_bounded"
    ),
}

PASSTHROUGH: Final = {
    "call_wait_s": Row(_REFUSED % "call_wait_s", f"{_HOLDING}test_call_is_refused_after_call_wait"),
    "waiting_max": Row(_REFUSED % "waiting_max", f"{_LISTENER}test_calls_that_wait_for_an_etcd"),
    "waiting_bytes_max": Row(
        _REFUSED % "waiting_bytes_max", "proxy/passthrough/test_holding.py::test_bytes_of_waiting_calls_are_bounded"
    ),
    "resend_bytes_max": Row(_NOT_KEPT % "resend_bytes_max", f"{_LISTENER}test_requests_kept_to_be_sent_again"),
    "resend_bytes_total_max": Row(
        _NOT_KEPT % "resend_bytes_total_max", f"{_LISTENER}test_requests_kept_to_be_sent_again"
    ),
    "unread_bytes_per_connection_max": Row(
        _REFUSED % "unread_bytes_per_connection_max", f"{_LISTENER}test_answers_that_are_not_read"
    ),
    "unread_bytes_max": Row(_REFUSED % "unread_bytes_max", f"{_LISTENER}test_answers_that_are_not_read"),
    "translated_request_bytes_max": Row(
        _REFUSED % "translated_request_bytes_max", f"{_TRANSLATING}test_requests_are_bounded_as_etcd_bounds_them"
    ),
    "partial_bytes_max": Row(
        _REFUSED % "partial_bytes_max", "e2e/test_namespace.py::test_unfinished_messages_have_a_bound"
    ),
    "shared_reads_bytes_max": _setting(
        "shared_reads_bytes_max", "e2e/test_shared_reads.py::test_reads_beyond_the_limit_of_bytes_go_alone"
    ),
}

HTTP1: Final = {
    "connect_timeout_s": Row(_HTTP1 % 502, f"{_LISTENER}test_http1_that_is_refused_is_counted"),
    "opening_timeout_s": Row(_HTTP1 % 408, f"{_LISTENER}test_http1_that_is_refused_is_counted"),
    "connections_max": Row(
        _HTTP1 % 503, "proxy/listening/test_http1.py::test_http1_connections_and_their_start_are_bounded"
    ),
    "hub_connections_max": Row(_HTTP1 % 503, "proxy/listening/test_http1.py::test_own_pages_of_the_hub"),
}

READS: Final = {
    "timeout_s": Row(_READS % "DEADLINE_EXCEEDED", f"{_LISTENER}test_reads_that_are_not_answered_in_time"),
    "probe_age_s_max": Row(NOTHING, "proxy/auth/test_queries.py::test_auth_off_is_remembered_for_probe_age_s_max"),
    "checks_in_flight_max": Row(
        "watchmux_checks_waiting",
        f"{_CHECKS}test_calls_in_flight_are_bounded_and_tokens_take_turns",
    ),
}

CONNECTION: Final = {
    "connect_timeout_s": Row(_UPSTREAM % "connect_timeout_s", f"{_UP}test_silent_endpoint_is_given_up_and_counted"),
    "next_address_s": Row(NOTHING, f"{_ADDRESSES}test_unresponsive_address_delays_no_client"),
    "settings_timeout_s": Row(
        _UPSTREAM % "settings_timeout_s", f"{_UP}test_server_that_ignores_settings_is_given_up_and_counted"
    ),
    "keepalive_s": Row(NOTHING, "upstream/test_pool.py::test_an_idle_connection_is_not_pinged"),
    "keepalive_timeout_s": Row(
        _UPSTREAM % "keepalive_timeout_s", f"{_UP}test_server_that_answers_no_ping_is_given_up_and_counted"
    ),
    "stream_window_bytes": Row(NOTHING, "upstream/test_connection.py::test_flow_control_goes_both_ways"),
    "connection_window_bytes": Row(
        NOTHING, "upstream/test_connection.py::test_flow_control_a_call_kept_is_returned_at_its_end"
    ),
    "useless_frames_max": Row(_UPSTREAM % "useless_frames_max", f"{_UP}test_server_that_sends_useless_frames"),
    "batch_interval_s": Row(NOTHING, "upstream/test_batching.py::test_a_burst_of_events_is_read_at_once_in_order"),
    "write_high_bytes": Row(NOTHING, "upstream/test_connection.py::test_full_transport_buffer_pauses_the_connection"),
    "write_low_bytes": Row(NOTHING, "upstream/test_connection.py::test_full_transport_buffer_pauses_the_connection"),
}

UPSTREAM: Final = {
    "backoff_first_s": Row(NOTHING, "upstream/test_endpoints.py::test_backoff_is_at_once_and_then_doubles_to_a_bound"),
    "backoff_max_s": Row(NOTHING, "upstream/test_endpoints.py::test_backoff_is_at_once_and_then_doubles_to_a_bound"),
    "stagger_s": Row(NOTHING, "upstream/test_watch.py::test_silent_endpoint_delays_no_other"),
    "connections_per_endpoint_max": _setting(
        "connections_per_endpoint_max",
        "upstream/test_watch_streams.py::test_streams_that_wait_for_a_place_are_reported",
    ),
    "surplus_idle_s": Row(NOTHING, "upstream/test_connections.py::test_surplus_connections_are_closed"),
    "place_wait_s": Row(
        "watchmux_upstream_streams_waiting",
        "upstream/test_connections.py::test_lack_of_places_and_its_end_are_reported",
    ),
    "status_timeout_s": Row(
        _UPSTREAM % "status_timeout_s", f"{_UP}test_unanswered_requests_of_the_watch_client_are_counted"
    ),
    "create_timeout_s": Row(
        _UPSTREAM % "create_timeout_s", f"{_UP}test_unanswered_requests_of_the_watch_client_are_counted"
    ),
    "watch_message_bytes_max": Row("watchmux_upstream_lost_total", f"{_UP}test_the_size_of_a_watch_response"),
    "unary_message_bytes_max": Row(_READS % "RESOURCE_EXHAUSTED", f"{_UP}test_the_size_of_an_answer_to_us"),
}


class Kept(NamedTuple):
    """Something that a client can make the proxy keep."""

    what: str
    counts_for: str
    """The limits."""

    until: str
    """The end of its cause, at which it is released."""

    test: str
    """Checks the release."""


_GIVEN_BACK: Final = "coalesce/test_given_back.py::"
_GARBAGE: Final = "e2e/test_garbage.py::test_ended_objects_are_freed_without_the_collector"

KEPT: Final = (
    Kept("a watch", "`watches_per_session_max`, `watches_max`", "its cancel, or its stream", _GARBAGE),
    Kept(
        "the id of a watch that a compaction cancelled",
        "`watches_per_session_max`, `watches_max`",
        "the client's cancel, or the stream",
        f"{_GIVEN_BACK}test_ids_that_a_compaction_cancelled_count_as_watches",
    ),
    Kept(
        "a create that waits for a read of now, also one that etcd does not answer",
        "`queue_max`, `line_bytes_max`",
        "the answer, or the stream",
        f"{_GIVEN_BACK}test_a_read_does_not_keep_closed_sessions",
    ),
    Kept(
        "a range with its upstream watch and its history",
        "`trunks_max`, `history_bytes_max`, `history_bytes_total_max`",
        "`linger_s` after its last watch",
        "coalesce/test_ending.py::test_a_trunk_lingers_with_its_history",
    ),
    Kept(
        "the history of a range without clients",
        "`parked_max`, `history_bytes_max`, `history_bytes_total_max`",
        "`history_linger_s` after its upstream watch",
        f"{_PARKING}test_a_parked_history_is_dropped_after_its_time",
    ),
    Kept(
        "the index of a cover's history by key",
        "an eighth of the history, so `history_bytes_max` and `history_bytes_total_max`; and 16 KiB",
        "eviction of the batches, or the end of the history",
        "coalesce/test_covers.py::test_the_index_of_a_cover_takes_at_most_an_eighth",
    ),
    Kept(
        "a catch-up watch and its window",
        "`backfills_max`, `backfill_bytes_max`",
        "its last watch",
        "coalesce/test_backfill.py::test_backfills_are_bounded_and_further_watches_are_queued",
    ),
    Kept(
        "responses that several laggards share",
        "eight, of `replay_bytes_max` (with fragment `fragment_run_bytes_max`) or one revision each",
        "the last laggard",
        f"{_GIVEN_BACK}test_cached_replays_are_freed_with_the_last_lagging_watch",
    ),
    Kept(
        "tokens that etcd refused for a range",
        "the sessions of the range",
        "the next time that etcd registers the range, or its end",
        f"{_GIVEN_BACK}test_refused_tokens_are_forgotten_with_the_next_created",
    ),
    Kept(
        "tokens that were tried to prove a new connection",
        "eight for each try (`TRIED_AT_ONCE`)",
        "the proof, or the next connection",
        "proxy/auth/test_restore.py::test_tried_tokens_are_forgotten_after_a_proof",
    ),
    Kept(
        "an event that is written in part to a client that does not read",
        "its HTTP/2 window, `write_buffer_bytes`",
        "the stream or the connection",
        "e2e/test_memory.py::test_streams_that_are_not_read_cost_little",
    ),
    Kept(
        "an answer that the client does not read",
        "`unread_bytes_per_connection_max`, `unread_bytes_max`",
        "its being read, or the call",
        "proxy/passthrough/test_translating.py::test_unread_answers_count_by_their_translated_size",
    ),
    Kept(
        "an answer that several Range calls share, and calls that wait to share one",
        "`shared_reads_bytes_max`",
        "the slowest client's having read it, or the calls",
        "e2e/test_shared_reads.py::test_a_slow_client_delays_no_other",
    ),
    Kept(
        "a request under `--namespace` that is not whole, or that etcd does not take",
        "`translated_request_bytes_max`, `partial_bytes_max`",
        "etcd's taking it, or the call",
        "proxy/passthrough/test_translating.py::test_requests_not_accepted_by_etcd_are_counted",
    ),
    Kept("a call that passes through", "`max_streams`, `resend_bytes_total_max`", "its end", _GARBAGE),
    Kept(
        "a connection, with its descriptor",
        "`connections_max`, RLIMIT_NOFILE",
        "its end",
        "proxy/process/test_descriptors.py::test_clients_do_not_take_what_etcd_and_probes_need",
    ),
    Kept(
        "header fields that the compression of a connection remembers",
        "`header_table_bytes`; 128 encoded fields",
        "the connection",
        "http2/test_compression.py::test_repeated_header_lists_are_short_and_keep_the_table",
    ),
    Kept(
        "ids of streams that were reset",
        "`resets_remembered`",
        "newer ones, or the connection",
        "http2/test_ends.py::test_late_frames_of_a_forgotten_stream_are_reset_again",
    ),
    Kept(
        "the streams of a connection that has ended",
        "`max_streams`",
        "turns of `leaving_per_turn`",
        "proxy/listening/test_leaving.py::test_streams_closed_at_once_are_reaped_in_turns",
    ),
    Kept(
        "delivery plans of groups with at least 32 watches",
        "one per group (about 0.1 KiB per watch)",
        "a watch that joins or leaves the group",
        "proxy/watch/test_delivery.py::test_a_plan_ends_with_the_next_change_of_its_group",
    ),
)
"""What clients can make the proxy keep."""


def sample(metric: str) -> tuple[str, dict[str, str]]:
    """Return the name and the labels of a metric as it is written here."""
    name, _, labels = metric.partition("{")
    return name, dict(re.findall(r'(\w+)="([^"]*)"', labels))
