// The status page: fetches /v1/overview every two seconds and shows the result. Text from the proxy (keys, addresses) is
// inserted as text only, never as markup.
"use strict";

const EVERY_MS = 2000;
const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
let before = null;
let seen = 0;  // When the values shown were received (ms); 0 before the first.

function count(value) {
  return value >= 100000 ? short.format(value) : whole.format(value);
}

function counted(value, one) {
  return `${count(value)} ${one}${value === 1 ? "" : "s"}`;
}

function rate(value) {
  return value >= 100 ? count(value) : value.toFixed(1).replace(/\.0$/, "");
}

function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${(value / size).toFixed(1)} ${unit}`;
  }
  return `${value} B`;
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 1) return `${+(value * 1000).toPrecision(3)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} days`;
}

function say(id, text, kind) {
  const element = byId(id);
  element.textContent = text;
  if (kind !== undefined) element.className = `${element.className.split(" ")[0]} ${kind}`;
}

function rows(id, list, cells, empty) {
  const body = byId(id).tBodies[0];
  const columns = byId(id).tHead.rows[0].cells;
  const made = list.map((item) => {
    const row = document.createElement("tr");
    cells(item).forEach((content, index) => {
      const cell = row.insertCell();
      cell.className = columns[index].className;
      if (content instanceof Node) cell.append(content);
      else if (content !== null && typeof content === "object") {
        cell.textContent = content.text;
        cell.title = content.title ?? content.text;
        cell.classList.add(content.kind);
      } else cell.textContent = content;
    });
    return row;
  });
  if (!made.length) {
    const row = document.createElement("tr");
    const cell = row.insertCell();
    cell.colSpan = columns.length;
    cell.className = "empty";
    cell.textContent = empty;
    made.push(row);
  }
  body.replaceChildren(...made);
}

// Draws two lines over time. `steps` uses a log scale: the lines are so far apart that only their ratio matters, and on
// a log scale equal ratios are equal distances.
function draw(id, points, first, second, steps) {
  const svg = byId(id);
  const width = svg.clientWidth || 500;
  const height = svg.clientHeight || 180;
  const left = 44, right = 10, top = 8, bottom = 20;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  const make = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parts.push(element);
  };
  const most = Math.max(1, ...points.map((point) => Math.max(first(point), second(point))));
  const highest = steps ? 10 ** Math.max(1, Math.ceil(Math.log10(most + 1))) : nice(most);
  const share = (value) => (steps ? Math.log10(Math.max(value, 0) + 1) / Math.log10(highest + 1) : value / highest);
  const y = (value) => height - bottom - share(value) * (height - top - bottom);
  const ticks = steps ? [0, 10, 100, 1000, 10000, 100000, 1000000, 10000000].filter((tick) => tick <= highest) : [0, highest / 2, highest];
  for (const tick of ticks) {
    make("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
    make("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short.format(tick));
  }
  if (points.length < 2) {
    make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "the first points appear within half a minute");
  } else {
    const from = points[0].at, to = points[points.length - 1].at;
    const x = (point) => left + ((point.at - from) / (to - from)) * (width - left - right);
    const path = (value) => points.map((point, index) => `${index ? "L" : "M"}${x(point).toFixed(1)} ${y(value(point)).toFixed(1)}`).join("");
    make("path", { class: "area", d: `${path(first)}L${x(points[points.length - 1])} ${y(0)}L${left} ${y(0)}Z` });
    make("path", { class: "line a", d: path(first) });
    make("path", { class: "line b", d: path(second) });
    make("text", { x: left, y: height - 4 }, `${seconds(to - from)} ago`);
    make("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "now");
  }
  svg.replaceChildren(...parts);
}

function drawCharts(points) {
  draw("chart-watches", points, (point) => point.watches, (point) => point.upstream_watches, true);
  draw("chart-events", points, (point) => point.events_out_per_s, (point) => point.events_in_per_s);
}

function nice(value) {
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((times) => times * step).find((candidate) => candidate >= value);
}

function showState(now, view) {
  say("state", now.serving ? "serving" : `not serving: ${now.reason}`, now.serving ? "good" : "bad");
  say("about", `${now.address} · ${now.host} · version ${now.version || "unknown"} · up ${seconds(now.uptime_s)}`);
  byId("store").hidden = !now.bundled_store;
  document.title = `${now.bundled_store ? "⚠ " : ""}${now.serving ? "" : "✕ "}watchmux ${now.address}`;
  const upstream = now.trunks + now.backfills;
  say("reduction", upstream && now.watches ? `${count(Math.round(now.watches / upstream))}×` : "–");
  say("watches", count(now.watches));
  say("watches-note", `${counted(now.sessions, "stream")}, ${counted(now.connections, "connection")}`);
  say("upstream", count(upstream));
  say("upstream-note", `${counted(now.trunks, "trunk")}, ${counted(now.backfills, "backfill")}`);
  const span = before && before.now.pid === now.pid ? now.uptime_s - before.now.uptime_s : 0;
  const per = (field) => (now[field] - before.now[field]) / span;
  say("out", span > 0 ? `${rate(per("events_delivered_total"))}/s` : "–");
  say("out-note", span > 0 ? `${rate(per("events_received_total"))}/s in, ${bytes(Math.round(per("written_bytes_total")))}/s out` : "");
  say("delay", seconds(view.delay_p99_s));
  say("delay-note", `p50 ${seconds(view.delay_p50_s)}, loop p99 ${seconds(view.loop_delay_p99_s)}`);
  say("lagging", count(now.lagging), now.lagging ? "warn" : "");
  say("lagging-note", now.lagging ? `longest ${seconds(now.lagging_s)}, ${count(now.lagging_revisions)} revisions` : "no client lags");
  say("reads", count(Math.max(0, now.range_calls_total - now.range_calls_upstream_total)));
  say("reads-note", `of ${count(now.range_calls_total)} Range calls, ${bytes(now.range_bytes_saved_total)}`);
}

function showTables(view) {
  rows("endpoints", view.endpoints, (each) => [
    { text: each.endpoint, kind: "key-text" },
    each.connected ? { text: "connected", kind: "good" } : { text: each.problem.replace(`${each.endpoint}: `, "") || "connecting", kind: "bad" },
    each.version || "–",
    each.carries_watches ? "watches and calls" : each.connected ? "calls" : "–",
  ], "no endpoints");
  const was = new Map((before ? before.trunks : []).map((trunk) => [trunk.range, trunk.events_total]));
  const span = before ? view.at - before.at : 0;
  rows("trunks", view.trunks, (each) => [
    { text: each.range, kind: "key-text" },
    whole.format(each.watches),
    span > 0 && was.has(each.range) ? rate(Math.max(0, each.events_total - was.get(each.range)) / span) : "–",
    count(each.events_total),
    each.opening ? "opening" : String(each.next_revision),
    bytes(each.history_bytes),
    whole.format(each.backfills),
  ], "no watches");
  say("trunks-note", view.now.trunks > view.trunks.length ? `the ${view.trunks.length} with the most watches of ${count(view.now.trunks)}` : "one upstream watch per range");
  const suggested = view.now.suggested_covers;
  byId("covers-section").hidden = !view.now.covers.length && !suggested.length;
  rows("covers", view.now.covers, (each) => [
    { text: each.cover || "all keys", kind: "key-text" },
    count(each.branches),
    count(each.watches),
    count(each.upstream_watches),
    count(each.events_total),
    `${count(each.unwanted_events_total)}, ${bytes(each.unwanted_bytes_total)}`,
    each.problem ? { text: `refused by etcd: ${each.problem}`, kind: "bad" } : each.costs_more ? { text: "costs more than it saves", kind: "warn" } : "works",
  ], "no covers");
  say("covers-note", suggested.map((each) => `--cover=${each.cover} would leave 1 upstream watch of ${count(each.ranges)}`).join("; "));
  rows("sessions", view.sessions, (each) => [
    { text: each.peer || "–", kind: "key-text" },
    seconds(each.behind_s),
    count(each.behind_revisions),
    `${count(each.lagging)} of ${count(each.watches)}`,
    bytes(each.unsent_bytes),
    each.stalled ? "reads too slowly" : "catching up",
  ], "no client lags");
  const all = view.now.connections;
  say("clients-note", all > view.clients.length ? `${count(view.clients.length)} of ${count(all)}; the others: /v1/clients` : "");
  rows("clients", view.clients, (each) => [
    { text: each.peer || "–", kind: "key-text" },
    { text: each.user_agent || "–", kind: "wrapped" },
    seconds(each.age_s),
    count(each.streams),
    count(each.watches),
    each.lagging ? seconds(each.behind_s) : "–",
    each.sent_bytes === null ? "–" : bytes(each.sent_bytes),
    each.received_bytes === null ? "–" : bytes(each.received_bytes),
    each.tls || "no",
  ], "no client is connected");
  byId("processes-part").hidden = view.processes.length === 0;
  rows("processes", view.processes, (each) => [
    { text: each.name, kind: "key-text" },
    String(each.pid),
    seconds(each.cpu_s),
    bytes(each.memory_bytes),
    count(each.connections),
    count(each.watches),
    count(each.events_delivered_total),
  ], "");
}

function showLimits(view) {
  const { now, limits } = view;
  const used = {
    connections_max: now.connections, max_concurrent_streams: now.connection_streams,
    sessions_per_connection_max: now.connection_sessions, requests_waiting_bytes_max: now.requests_waiting_bytes, watches_max: now.watches, trunks_max: now.trunks,
    backfills_max: now.backfills, history_bytes_total_max: now.history_bytes, lagging_age_s_max: now.lagging_s,
    shared_reads_bytes_max: now.shared_reads_bytes,
  };
  const reached = { ...now.refusals_total, ...now.evictions_total, backfills_max: now.queued, shared_reads_bytes_max: now.range_calls_not_shared_total };
  const shown = (name, value) => (name.includes("bytes") ? bytes(value) : name.includes("_s_") ? seconds(value) : count(value));
  const listed = Object.keys(limits).filter((name) => name in used || reached[name]);
  rows("limits", listed, (name) => {
    const bar = document.createElement("meter");
    const limit = limits[name];
    if (name in used && limit) {
      bar.max = limit;
      bar.high = limit * 0.8;
      bar.optimum = 0;
      bar.value = used[name];
      bar.textContent = `${used[name]} of ${limit}`;
    }
    return [name, name in used ? shown(name, used[name]) : "–", limit ? shown(name, limit) : "none",
      name in used && limit ? bar : "", count(reached[name] ?? 0)];
  }, "");
}

async function refresh() {
  try {
    const answer = await fetch("/v1/overview", { cache: "no-store" });
    const view = await answer.json();
    showState(view.now, view);
    drawCharts(view.points);
    showTables(view);
    showLimits(view);
    before = view;
    seen = Date.now();
    document.body.classList.remove("stale");
    say("stamp", `as of ${new Date(view.at * 1000).toLocaleTimeString()}`);
    document.body.dataset.ready = "yes";
  } catch (error) {
    const age = seen ? `; the values are ${seconds(Math.round((Date.now() - seen) / 1000))} old` : "";
    say("state", `the proxy does not respond${age}`, "bad");
    document.title = `✕ no response: ${document.title.replace(/^✕ (no response: )?/, "")}`;
    document.body.classList.toggle("stale", seen > 0);
    byId("stamp").textContent = String(error.message || error);
  }
  setTimeout(refresh, EVERY_MS);
}

addEventListener("resize", () => before && drawCharts(before.points));
refresh();
