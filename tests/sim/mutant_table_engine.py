"""Deliberate bugs in the decisions of the engine and the watch client: reads, restores, and the choice of a server."""

from __future__ import annotations

from tests.sim.mutants import Mutant

_QUERIES = "proxy.auth.queries"
_CHECKS = "proxy.auth.permission_checks"
_ATTEMPTS = "upstream.attempts"
_ROLLBACK = "proxy.auth.restore"
_CHOICE = "upstream.watching.choice"
_LINEAGE = "upstream.watching.lineage"

ENGINE_MUTANTS: tuple[Mutant, ...] = (
    # Reads.
    Mutant(
        "an answer of the store before the restore is now",
        _QUERIES,
        "if self.rollback.is_stale(call.begun):",
        "if False:",
    ),
    Mutant(
        "a probe that began before the create is a read of now",
        _QUERIES,
        "Granted(answer) if check.fresh else answer",
        "Granted(answer)",
    ),
    Mutant(
        "with auth on no session has a token", _QUERIES, "if check.asked.token is None else self", "if True else self"
    ),
    Mutant(
        "a read that failed is given up",
        _QUERIES,
        "call.linearizable = True\n        return [SendCall(call, later=True)]",
        "return []",
    ),
    Mutant("a read waits for the leader", _QUERIES, "call.linearizable = False", "call.linearizable = True"),
    Mutant(
        "a member without a leader tells what is now though others have one",
        _QUERIES,
        "if leaderless and call.linearizable and",
        "if call.linearizable and",
    ),
    Mutant(
        "one member alone decides about a right",
        _CHECKS,
        "        self._release(batch)\n        return [SendCall(batch.call, later=True)",
        "        batch.call.linearizable = False\n        return [SendCall(batch.call, later=True)",
    ),
    Mutant("a range that is refused takes the others along", _CHECKS, "if len(batch.waiting) > 1:", "if False:"),
    Mutant("a place is never given back", _CHECKS, "self.in_flight[batch.standing] -= 1", "pass"),
    Mutant(
        "a refused token takes only one create along",
        _CHECKS,
        "for check in line.take_before(batch.sent_number):",
        "for check in line.take_before(batch.sent_number)[:1]:",
    ),
    Mutant(
        "a call that failed everywhere is forgotten",
        _ATTEMPTS,
        "return None if self.open or self._untried else self._of_all()",
        "return None",
    ),
    Mutant(
        "a key too large is asked about for ever",
        _CHECKS,
        "        if is_too_large(status, text):\n            return self._done(batch, batch.end(status, text))\n",
        "        if is_too_large(status, text):\n            return [SendCall(batch.call, later=True)]\n",
    ),
    Mutant(
        "a probe that is not wanted any more is waited for",
        _QUERIES,
        "if query is self._probe:\n            self._probe = None",
        "if query is self._probe:\n            pass",
    ),
    # Whether the store has gone back.
    Mutant("a store that went back is believed", _ROLLBACK, "if header.revision < begun.known:", "if False:"),
    Mutant("what a lagging member says is a rollback", _ROLLBACK, "        if linearizable:\n", "        if True:\n"),
    Mutant(
        "a read is held against what was known when it came",
        _ROLLBACK,
        "if header.revision < begun.known:",
        "if header.revision < max(begun.known, self._newest_read):",
    ),
    Mutant("after a rollback late answers count", _ROLLBACK, "self._epoch += 1", "pass"),
    Mutant(
        "after a rollback the old revision is still known",
        _ROLLBACK,
        "self._epoch += 1\n        self._newest_read = header.revision",
        "self._epoch += 1",
    ),
    Mutant("a new connection is not proven", _ROLLBACK, "self.unproven = True", "self.unproven = False"),
    Mutant(
        "a restored store that has grown past the old one is believed",
        _LINEAGE,
        "if self.known is not None and is_suspect(self.known, now):",
        "if False:",
    ),
    Mutant(
        "a member that lags is a restored store",
        _LINEAGE,
        "written > now.committed - before.applied",
        "written > now.committed - before.committed",
    ),
    Mutant(
        "a first impression is enough",
        _LINEAGE,
        "if self.known is not None and is_suspect(self.known, now._replace(committed=later.committed)):",
        "if self.known is not None:",
    ),
    # The choice of a server.
    Mutant("a server without a leader will do", _CHOICE, "return has_leader or self.leaderless", "return True"),
    Mutant(
        "a leader that is there again is not seen",
        _CHOICE,
        "        if has_leader:\n            self.leaderless = False",
        "        pass",
    ),
    Mutant(
        "one without a leader speaks for all",
        _CHOICE,
        "all(each.tried for each in known) and any(",
        "any(",
    ),
    Mutant(
        "no session is notified that there is no leader",
        _CHOICE,
        "        return self.leaderless\n",
        "        return False\n",
    ),
    Mutant(
        "a stream without a leader stays where it is",
        _CHOICE,
        "server.leaderless = True\n        return StreamEndAction.ELSEWHERE",
        "server.leaderless = True\n        return StreamEndAction.HERE",
    ),
    Mutant(
        "an endpoint that is none any more is kept",
        _CHOICE,
        "SearchGoal.NOTHING if is_endpoint else SearchGoal.ENDPOINT",
        "SearchGoal.NOTHING",
    ),
    Mutant(
        "who wants a leader takes what is there",
        _CHOICE,
        "return has_leader if wanted is SearchGoal.LEADER else",
        "return True if wanted is SearchGoal.LEADER else",
    ),
)
