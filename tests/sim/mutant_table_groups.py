"""Deliberate bugs in own groups: a session's watches of one range, which an event leaves behind together."""

from __future__ import annotations

from tests.sim.mutants import Mutant

GROUP_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "progress does not wait for a group behind",
        "waiting",
        "if group.behind is not None:",
        "if False:",
    ),
    Mutant(
        "progress_notify does not wait for a group behind",
        "model",
        "return self.group is not None and self.group.behind is None",
        "return self.group is not None",
    ),
    Mutant(
        "a group that is left behind twice loses its first revision",
        "fanout",
        "if group.behind is None and group.members:",
        "if group.behind is not None: group.behind = revision\n        elif group.members:",
    ),
    Mutant(
        "a watch that leaves a group behind loses what the group still needs",
        "fanout",
        "source.next_revision if group.behind is None else group.behind",
        "source.next_revision",
    ),
    Mutant(
        "a watch joins a group behind",
        "fanout",
        "if group.behind is None and len(group.members) < OWN_GROUP_WATCHES_MAX:",
        "if len(group.members) < OWN_GROUP_WATCHES_MAX:",
    ),
    Mutant(
        "a group that was sent a part follows its source again",
        "replay",
        "if following is None or following >= source.next_revision:",
        "if True:",
    ),
    Mutant(
        "a group behind skips what the history has lost",
        "replay",
        "if source.serves(first):",
        "if True:",
    ),
    Mutant(
        "a group that was left behind is sent the event at once as well",
        "fanout",
        "self._leave_behind(group, group.session, first_revision)\n                continue",
        "self._leave_behind(group, group.session, first_revision)",
    ),
)
