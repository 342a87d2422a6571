"""Deliberate bugs in work that is done in parts, or passed on in another order, and in progress through two levels."""

from __future__ import annotations

from tests.sim.mutants import Mutant

_CLIENT = "upstream.watching.state"
_FEED = "upstream.watching.feed"
_REGISTRATIONS = "upstream.watching.registrations"
_PROOF = "upstream.watching.proof"

PARTS_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "old bookmarks are looked for in the first part of the trunks only",
        "progress",
        "del self._to_look[-TRUNKS_PER_LOOK_MAX:]",
        "self._to_look.clear()",
    ),
    Mutant(
        "progress is requested on one stream of a token",
        _CLIENT,
        "return dict.fromkeys(stream for stream in streams if stream is not None)",
        "return list({each.token: each for each in streams if each is not None}.values())",
    ),
    Mutant(
        "an event overtakes one that is held back",
        _FEED,
        "same=response.watch_id in ids",
        "same=False",
    ),
    Mutant(
        "an answer to a progress request overtakes what is held back",
        _FEED,
        "overtakes = bool(held) and ",
        "overtakes = bool(held) and response.watch_id >= 0 and ",
    ),
    Mutant(
        "what is held back follows what came after it",
        _FEED,
        "new = [waiting.pop() for _ in range(self._new)] if held else []",
        "new = [waiting.pop() for _ in range(0)] if held else []",
    ),
    Mutant(
        "a created watch overtakes the refusal of an earlier create",
        _FEED,
        """
        if response.created and creates:
            return True
        return same if response.watch_id >= 0 else not response.created
        """,
        "return same or (response.watch_id < 0 and not response.created)",
    ),
    Mutant(
        "a created watch overtakes an earlier answer that waits",
        _FEED,
        "if response.created and creates:",
        "if False:",
    ),
    Mutant(
        "a created watch overtakes an earlier answer of the same bytes",
        _FEED,
        "holds_creates = holds_creates or response.created",
        "pass",
    ),
    Mutant(
        "of several responses without events one is lost",
        _FEED,
        """
        if not isinstance(first, WatchResponse) or first.events:
            return
        self._release()
        """,
        """
        self._release()
            if not isinstance(first, WatchResponse) or first.events:
                return
        """,
    ),
    Mutant(
        "an answered suspect registers twice",
        _REGISTRATIONS,
        "if registration.stream is None and not registration.closed:",
        "if not registration.closed:",
    ),
    # Sources whose watches end in steps.
    Mutant(
        "a trunk that was lost before a restore is not opened again",
        "losing",
        "if trunk.upstream.closed:",
        "if False:",
    ),
    Mutant(
        "a trunk that is used again keeps its upstream watch below a wider cover",
        "moving",
        "if not trunk.is_used:",
        "if False:",
    ),
    Mutant(
        "a proxy is asked for progress like etcd",
        _PROOF,
        "if late or stream.answers_from <= stream.requested or not stream.ordered:",
        "if stream.answers_from <= stream.requested or not stream.ordered:",
        two_levels=True,
    ),
    Mutant(
        "a proxy is refused its question without a read",
        "joining",
        "is_probe = create.has_empty_range and create.request.start_revision is None and create.header is None",
        "is_probe = False",
        two_levels=True,
    ),
)
