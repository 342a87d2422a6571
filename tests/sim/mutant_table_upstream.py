"""Deliberate bugs below the core: in the state of the watch client, and in the bundled store."""

from __future__ import annotations

from tests.sim.mutants import Mutant

_CLIENT = "upstream.watching.state"
_POSITIONS = "upstream.watching.positions"
_PROOF = "upstream.watching.proof"
_SUSPECTS = "upstream.watching.suspects"
_FEED = "upstream.watching.feed"
_STORE = "upstream.store"

CLIENT_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "a resumed watch waits in the future and silences progress",
        _CLIENT,
        "skips = start is not None and self._skips(start)",
        "skips = False",
    ),
    Mutant(
        "what was written while a watch was resumed is skipped",
        _CLIENT,
        "elif create.skips and header.revision >= (registration.next_revision or 0):",
        "elif False:",
    ),
    Mutant(
        "a resumed watch begins one revision late",
        _CLIENT,
        "        start = registration.next_revision\n        skips",
        "        start = registration.next_revision and registration.next_revision + 1\n        skips",
    ),
    Mutant(
        "an old answer proves a new watch complete",
        _CLIENT,
        "registration.unproven = stream.requested",
        "registration.unproven = 0",
    ),
    Mutant("any answer proves any watch complete", _PROOF, "registration.unproven < stream.answers_from", "True"),
    Mutant("half a revision is passed on", _POSITIONS, "whole -= 1", "break"),
    Mutant(
        "what came before the break comes again",
        _POSITIONS,
        "[event for event in events if event.revision >= next_revision]",
        "list(events)",
    ),
    Mutant(
        "a compaction ends who has missed nothing", _CLIENT, "if next_revision >= compact_revision and", "if False and"
    ),
    Mutant(
        "a closed watch goes on upstream",
        _CLIENT,
        "elif watch_id is not None:\n            self._cancel",
        "elif False:\n            self._cancel",
    ),
    Mutant(
        "a create that was given up meanwhile stays open",
        _CLIENT,
        "elif registration.closed:\n            self._cancel(stream, response.watch_id, effects)",
        "elif registration.closed:\n            pass",
    ),
    Mutant(
        "a break forgets those who were just creating",
        _CLIENT,
        "self._registrations.take():\n            self._register",
        "self._registrations.take():\n            if registration.announced:\n                self._register",
    ),
    Mutant("all suspects are tried together for ever", _SUSPECTS, "elif len(suspects) > 1:", "elif False:"),
    Mutant("a create that was closed condemns another one", _SUSPECTS, "elif len(stream.creating) > 1:", "elif False:"),
    Mutant(
        "suspects stay suspects",
        _CLIENT,
        "if stream.tested and stream.live and not stream.unanswered:\n            "
        "self._clear_suspects(stream, effects)",
        "pass",
    ),
    Mutant(
        "events of one watch are joined to those of another",
        _FEED,
        "and response.watch_id == last.watch_id\n",
        "\n",
    ),
    Mutant(
        "progress overtakes the events that it speaks of",
        _FEED,
        "waits = _must_wait(",
        "waits = response.watch_id >= 0 and _must_wait(",
    ),
    Mutant(
        "events overtake a large response for the same watch",
        _FEED,
        "or any(each.watch_id == watch_id for each in self._large)",
        "",
    ),
    Mutant(
        "events overtake a response of the same watch that is held back",
        _FEED,
        "same = watch_id in self._waiting_ids or ",
        "same = ",
    ),
    Mutant(
        "created is reported at each connection",
        _CLIENT,
        "            registration.announced = True",
        "            pass",
    ),
)

STORE_MUTANTS: tuple[Mutant, ...] = (
    # Watchers and their groups.
    Mutant(
        "a victim skips a revision",
        f"{_STORE}.watchable",
        "self._add_victim(watcher, message, revision + 1)",
        "self._add_victim(watcher, message, revision + 2)",
    ),
    Mutant(
        "a victim is left where it is",
        f"{_STORE}.watchable",
        "del self._victims[watcher]\n                self._place(watcher)",
        "del self._victims[watcher]",
    ),
    Mutant(
        "a full queue takes what it cannot keep",
        f"{_STORE}.watchable",
        "            return False\n        watcher.progress_due",
        "            return True\n        watcher.progress_due",
    ),
    Mutant(
        "a batch that is full counts as all",
        f"{_STORE}.watchable",
        "upto = cohort.more_revision or last + 1",
        "upto = last + 1",
    ),
    Mutant(
        "the rest of a batch begins too late",
        f"{_STORE}.watchable",
        "self.more_revision = revision",
        "self.more_revision = revision + 1",
    ),
    Mutant(
        "a revision is cut in two",
        f"{_STORE}.watchable",
        "            self._last = revision",
        "            self._last = 0",
    ),
    Mutant(
        "a compacted start is served",
        f"{_STORE}.watchable",
        "if watcher.next_revision < self.mvcc.compact_revision:",
        "if watcher.next_revision < 0:",
    ),
    Mutant(
        "a compaction cancels at its own revision",
        f"{_STORE}.watchable",
        "if watcher.next_revision < self.mvcc.compact_revision:",
        "if watcher.next_revision <= self.mvcc.compact_revision:",
    ),
    Mutant(
        "a watch from now misses the first event",
        f"{_STORE}.watchable",
        "start_revision or revision + 1",
        "start_revision or revision + 2",
    ),
    Mutant(
        "progress is answered while watchers are behind",
        f"{_STORE}.watchable",
        "if self._watchers and all(map(self._is_complete, self._watchers.values())):",
        "if self._watchers:",
    ),
    Mutant(
        "the ticker speaks for watchers that are behind",
        f"{_STORE}.watchable",
        "if watcher.progress_due and self._is_complete(watcher):",
        "if watcher.progress_due:",
    ),
    Mutant(
        "progress is never answered",
        f"{_STORE}.watchable",
        "            self._offer(WatchMessage(INVALID_WATCH_ID",
        "            str(WatchMessage(INVALID_WATCH_ID",
    ),
    Mutant(
        "a cancelled watch goes on",
        f"{_STORE}.watchable",
        "            return\n        self._store.remove(watcher)",
        "            return",
    ),
    Mutant(
        "the watchers of a closed stream stay",
        f"{_STORE}.watchable",
        "for watcher in self._watchers.values():\n            self._store.remove(watcher)",
        "for watcher in self._watchers.values():\n            str(watcher)",
    ),
    Mutant(
        "an event reaches only one of overlapping ranges",
        f"{_STORE}.watchable",
        "for watchers in self._synced.spans.around(changes[0].key)]",
        "for watchers in list(self._synced.spans.around(changes[0].key))[:1]]",
    ),
    # Responses.
    Mutant("the last fragment says that more follows", f"{_STORE}.watch_batch", "more=at < last", "more=at <= last"),
    Mutant("a fragment is lost", f"{_STORE}.watch_batch", "pieces.append([])", "pieces[-1:] = [[]]"),
    Mutant(
        "prev_kv is the new value", f"{_STORE}.mvcc", "before = record.mod_revision - 1", "before = record.mod_revision"
    ),
    Mutant(
        "prev_kv is not sent",
        f"{_STORE}.watch_batch",
        "if prev_kv and not record.created and",
        "if prev_kv and record.deleted and",
    ),
    Mutant("a delete is sent as a put", f"{_STORE}.watch_batch", "type=kv_pb2.Event.DELETE", "type=kv_pb2.Event.PUT"),
    Mutant(
        "only the newest of a batch of commits is shown",
        f"{_STORE}.state",
        "for changes in self._take_unpublished():",
        "for changes in self._take_unpublished()[-1:]:",
    ),
    # Keys and revisions.
    Mutant(
        "versions stand still",
        f"{_STORE}.mvcc",
        "1 if before is None else before.version + 1",
        "1 if before is None else before.version",
    ),
    Mutant(
        "a key that comes back keeps its creation",
        f"{_STORE}.index",
        "if history is None or history[-1].deleted:\n            return None\n        return history[-1]",
        "if history is None:\n            return None\n        return history[-1]",
    ),
    Mutant(
        "all changes of a revision have one place",
        f"{_STORE}.mvcc",
        'self._add(RevisionRecord(before.key, b"", 0, self._next, len(self._changes), 0, 0, deleted=True))',
        'self._add(RevisionRecord(before.key, b"", 0, self._next, 0, 0, 0, deleted=True))',
    ),
    Mutant(
        "a compaction drops what is still current",
        f"{_STORE}.index",
        "key=_mod_revision) - 1\n    if place < 0",
        "key=_mod_revision)\n    if place < 0",
    ),
    Mutant(
        "a compaction drops the delete at its own revision",
        f"{_STORE}.index",
        "return place + 1 if history[place].deleted and history[place].mod_revision < revision else place",
        "return place + 1 if history[place].deleted else place",
    ),
    Mutant(
        "the log is cut above the compaction",
        f"{_STORE}.mvcc",
        "del self._log[: revision - self._log_start]\n            self._log_start = revision",
        "del self._log[: revision - self._log_start + 1]\n            self._log_start = revision + 1",
    ),
    Mutant(
        "a restart forgets the compaction",
        f"{_STORE}.mvcc",
        "        self.compact_revision = compact_revision\n        self._log_start",
        "        self._log_start",
    ),
    Mutant(
        "a restart forgets a revision",
        f"{_STORE}.mvcc",
        "if record.mod_revision >= self._log_start:",
        "if record.mod_revision > self._log_start:",
    ),
    # Leases.
    Mutant(
        "a key stays with the lease it had", f"{_STORE}.lease", "                before.keys.discard(record.key)\n", ""
    ),
    Mutant(
        "a lease ends and its keys stay",
        f"{_STORE}.state",
        "        for key in keys:\n            txn.delete_range(key)",
        "        for key in keys[:-1]:\n            txn.delete_range(key)",
    ),
    Mutant(
        "a restart forgets whose keys are a lease's",
        f"{_STORE}.state",
        "        self.lessor.follow(self.mvcc.index.newest_records())\n",
        "",
    ),
)
