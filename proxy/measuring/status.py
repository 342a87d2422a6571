"""`watchmux status`: shows the /v1/status of a running proxy in a terminal, once or live."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

import aiohttp
import msgspec
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from proxy.admin.snapshot import CoverState, Snapshot
from proxy.admin.views import Clients
from proxy.measuring.comparison import Unit, counted, show_age, show_value
from proxy.measuring.load.prometheus import NoMetrics, http_reason, open_session
from proxy.measuring.load.target import ConnectionFiles

T = TypeVar("T")

FETCH_LIMIT_S = 5.0
REFRESH_S = 1.0
EXPIRY_SHOWN_S = 7 * 86400.0
CERTIFICATES = {"listener": "--cert-file, which clients check", "upstream": "--cert, which etcd checks"}
JOINED = {"live": "from now", "future": "from later", "history": "from history", "backfill": "by a backfill"}
"""Where watches began, by the label of the metric."""


class NoStatus(Exception):
    """The proxy's status could not be read; the text is one line."""


async def fetch(session: aiohttp.ClientSession, url: str) -> Snapshot:
    """Fetch a proxy's status. Raises NoStatus."""
    return await _get(session, url, "status", Snapshot)


async def _get(session: aiohttp.ClientSession, url: str, page: str, kind: type[T]) -> T:
    try:
        async with session.get(f"{url}/v1/{page}", timeout=aiohttp.ClientTimeout(total=FETCH_LIMIT_S)) as answer:
            body = await answer.read()
            if answer.status == 401:
                raise NoStatus(f"{url} demands a user: give --user=NAME")
            if answer.status != 200:
                raise NoStatus(
                    f"{url} answered {answer.status} {answer.reason}: it is not the metrics address of a watchmux"
                )
            return msgspec.json.decode(body, type=kind)
    except (aiohttp.ClientError, OSError) as error:
        hint = "is it the --metrics-addr of a running watchmux?"
        raise NoStatus(f"cannot reach {url}: {http_reason(error)}; {hint}") from None
    except msgspec.DecodeError:
        raise NoStatus(f"{url} does not answer like a watchmux; is it the --metrics-addr?") from None


def render(now: Snapshot, before: Snapshot | None = None, stale: str = "") -> Table:
    """Make the table; with an earlier snapshot `before`, also with rates per second.

    `stale`: why the snapshot is not of now; "" if it is.
    """
    host = f" on {now.host}" if now.host else ""
    title = f"watchmux {now.version} at {now.address}{host}, up {show_age(now.uptime_s)}"
    if stale:
        title += f"\n[bold red]STALE: {escape(stale)}"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("number", justify="right", style="bold")
    table.add_column("note", style="dim", overflow="fold")
    state = Text("serving", style="bold green") if now.serving else Text("not serving", style="bold red")
    table.add_row("state", state, now.reason or "in front of " + ", ".join(now.endpoints))
    for problem in now.endpoint_problems:
        table.add_row("  endpoint", Text("unusable", style="bold red"), escape(problem))
    for use, expires_at in now.certificate_expiry_s.items():
        left_s = expires_at - time.time()
        if left_s < EXPIRY_SHOWN_S:
            state = Text("expired" if left_s < 0 else show_age(left_s), style="bold red")
            table.add_row("  certificate", state, f"of {CERTIFICATES[use]}: renew the file, without a restart")
    if now.bundled_store:
        lost = "no etcd is configured; all data is lost when the proxy stops"
        table.add_row("store", Text("bundled, in memory", style="bold red"), lost)
    table.add_section()
    clients = f"on {counted(now.sessions, 'stream')}, {counted(now.connections, 'connection')}"
    table.add_row("client watches", f"{now.watches:,}", clients)
    upstream = f"{counted(now.trunks, 'trunk')}, {counted(now.backfills, 'backfill')}"
    table.add_row("upstream watches", f"{now.upstream_watches:,}", upstream)
    for cover in now.covers:
        table.add_row(f"  cover {cover.cover or 'of all keys'}", f"{cover.branches:,}", _cover_note(cover))
    for each in now.suggested_covers:
        table.add_row("  suggested", f"{each.ranges:,}", f"ranges: --cover={each.cover} would leave 1 upstream watch")
    reduction = f"{now.reduction:,.1f}x" if now.reduction else "-"
    table.add_row("reduction", reduction, "client watches for each upstream watch")
    behind = f", longest {now.lagging_s:,.0f} s and {now.lagging_revisions:,} revisions" if now.lagging else ""
    stalls = f"{counted(now.stalls_total, 'stall')}, {now.queued:,} waiting for a backfill"
    table.add_row("lagging", f"{now.lagging:,}", stalls + behind)
    table.add_section()
    for name, field in (("events in", "events_received_total"), ("events out", "events_delivered_total")):
        table.add_row(name, f"{getattr(now, field):,}", _rate(now, before, field, "events"))
    sent = show_value(now.delivered_bytes_total, Unit.BYTES)
    table.add_row("bytes out", sent, _rate(now, before, "delivered_bytes_total", "bytes"))
    table.add_row(
        "history", show_value(now.history_bytes, Unit.BYTES), f"in {counted(now.history_batches, 'response')}"
    )
    saved = f"{now.reads_saved:,} saved, {show_value(now.range_bytes_saved_total, Unit.BYTES)}"
    table.add_row("range calls", f"{now.range_calls_total:,}", f"{now.range_calls_upstream_total:,} at etcd, {saved}")
    table.add_section()
    joins = ", ".join(f"{count:,} {JOINED[kind]}" for kind, count in now.joins_total.items() if count)
    # The proxy requests a watch of itself in each self-probe, and refuses it; the counters include these.
    refused = max(0, now.creates_refused_total - now.probes_total)
    table.add_row("watches opened", f"{now.creates_total - now.creates_refused_total:,}", joins or "none yet")
    table.add_row("refused", f"{refused:,}", f"{now.compacted_total:,} cancelled as compacted")
    for limit, count in now.refusals_total.items():
        if count:
            table.add_row(f"  at {limit}", Text(f"{count:,}", style="bold red"), "refused or ended at this limit")
    table.add_row(
        "upstream breaks", f"{now.upstream_broken_total:,}", f"{now.upstream_lost_total:,} watches lost for good"
    )
    return table


def _cover_note(cover: CoverState) -> str:
    if cover.problem:
        return f"refused by etcd, its ranges have upstream watches of their own: {cover.problem}"
    share = cover.unwanted_events_total / cover.events_total if cover.events_total else 0.0
    note = f"ranges on {cover.upstream_watches:,} upstream watches, {share:.0%} of its events are not watched"
    return note + ("; costs more than it saves" if cover.costs_more else "")


def _rate(now: Snapshot, before: Snapshot | None, field: str, unit: str) -> str:
    elapsed_s = now.uptime_s - before.uptime_s if before is not None else now.uptime_s
    if elapsed_s <= 0:
        return ""
    count = getattr(now, field) - (getattr(before, field) if before is not None else 0)
    span = "now" if before is not None else "on average"
    rate = count / elapsed_s
    shown = show_value(rate, Unit.BYTES) if unit == "bytes" else f"{rate:,.1f} {unit}"
    return f"{shown} a second {span}"


def _session(url: str, access: ConnectionFiles) -> aiohttp.ClientSession:
    try:
        return open_session(url, access)
    except NoMetrics as error:
        raise NoStatus(str(error)) from None


async def show_once(url: str, console: Console, access: ConnectionFiles, *, as_json: bool = False) -> bool:
    """Print the status once; return whether the proxy serves. Raises NoStatus."""
    async with _session(url, access) as session:
        snapshot = await fetch(session, url)
    if as_json:
        console.print_json(msgspec.json.encode(snapshot).decode())
    else:
        console.print(render(snapshot))
    return snapshot.serving


async def show_clients(url: str, console: Console, access: ConnectionFiles, *, as_json: bool = False) -> None:
    """Print the list of clients. Raises NoStatus."""
    async with _session(url, access) as session:
        listed = await _get(session, url, "clients", Clients)
    if as_json:
        console.print_json(msgspec.json.encode(listed).decode())
    else:
        console.print(render_clients(listed))


def render_clients(listed: Clients) -> Table:
    """Make the table of clients: two lines for each, which fit into 60 columns."""
    title = f"{len(listed.clients):,} of {counted(listed.connections, 'client connection')}"
    table = Table(title=title, title_justify="left")
    table.add_column("client\nuser agent, TLS", overflow="fold")
    for name in ("connected\nbehind", "streams\nwatches", "sent\nreceived"):
        table.add_column(name, justify="right")
    for each in listed.clients:
        table.add_row(
            Text(f"{each.peer}\n{each.user_agent or '-'}, {each.tls or 'no TLS'}"),
            f"{show_age(each.age_s)}\n{f'{each.behind_s:,.1f} s' if each.lagging else '-'}",
            f"{each.streams:,}\n{each.watches:,}",
            "\n".join(show_value(count, Unit.BYTES) for count in (each.sent_bytes, each.received_bytes)),
        )
    return table


async def show_live(url: str, console: Console, access: ConnectionFiles) -> None:
    """Show the status until interrupted; while the proxy does not answer, the last status with its age.

    Raises NoStatus if it does not answer at first.
    """
    async with _session(url, access) as session:
        before, seen_at = await fetch(session, url), time.monotonic()
        with Live(render(before), console=console, refresh_per_second=4) as live:
            while True:
                await asyncio.sleep(REFRESH_S)
                try:
                    now = await fetch(session, url)
                except NoStatus as error:
                    age_s = time.monotonic() - seen_at
                    live.update(render(before, stale=f"{show_age(age_s)} old; {error}"))
                    continue
                live.update(render(now, before))
                before, seen_at = now, time.monotonic()
