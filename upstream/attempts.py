"""Which endpoints one call of the proxy's own is sent to, and when it has failed: pure.

Driven by `hedged.py` and the simulator. Each endpoint gets the call once, by name. Other calls that go round the same
endpoints at the same time do not change which ones this call has tried, so a member that is cut off from its cluster
cannot answer in place of all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from proto import etcd_errors
from proto.framing import Status

_ABOUT_REQUEST: Final = frozenset({Status.INVALID_ARGUMENT, Status.PERMISSION_DENIED, Status.UNAUTHENTICATED})
_ABOUT_SERVER: Final = frozenset({Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.CANCELLED})
_TOO_LARGE: Final = "larger than max"
"""Part of grpc-go's text for a request above the server's limit, "grpc: received message larger than max (2 vs. 1)"
(rpc_util.go)."""


def is_too_large(status: int, text: str) -> bool:
    """Whether a server refused a request for its size."""
    return status == Status.RESOURCE_EXHAUSTED and _TOO_LARGE in text


def is_about_request(status: int, text: str) -> bool:
    """Whether the request itself, its token or its key caused a failure: every endpoint would refuse it."""
    return status in _ABOUT_REQUEST or is_too_large(status, text)


def is_about_server(status: int) -> bool:
    """Whether a failure means that the server could not answer now. A failure of neither kind is unclear."""
    return status in _ABOUT_SERVER


class Failure(NamedTuple):
    """How a call failed: the gRPC status and its text."""

    status: int
    text: str


class Attempts:
    """The endpoints of one call."""

    __slots__ = ("_failures", "_given_back", "_untried", "open")

    def __init__(self, endpoints: Iterable[str]) -> None:
        """`endpoints`: the names, in the order in which they are tried."""
        self._untried = deque(dict.fromkeys(endpoints))
        # Endpoints that have the call and have not answered.
        self.open: set[str] = set()
        self._failures: list[Failure] = []
        # `give_back` was called.
        self._given_back = False

    @property
    def left(self) -> bool:
        """There are endpoints that the call has not been sent to."""
        return bool(self._untried)

    @property
    def is_only_try(self) -> bool:
        """There is one endpoint, and it has not been tried before."""
        return len(self.open) == 1 and not self._untried and not self._failures and not self._given_back

    def next(self) -> str | None:
        """Return the next endpoint to send the call to: at the start, when an answer is late, or after a failure."""
        if not self._untried:
            return None
        endpoint = self._untried.popleft()
        self.open.add(endpoint)
        return endpoint

    def give_back(self, endpoint: str) -> None:
        """Requeue an endpoint that did not process the call, behind the others."""
        self.open.discard(endpoint)
        self._untried.append(endpoint)
        self._given_back = True

    def failed(self, endpoint: str, status: int, text: str) -> Failure | None:
        """Record the failure of one attempt; return the failure of the call once no attempt is left to wait for."""
        self.open.discard(endpoint)
        failure = Failure(status, text)
        if is_about_request(status, text):
            return failure
        self._failures.append(failure)
        return None if self.open or self._untried else self._of_all()

    def _of_all(self) -> Failure:
        """Combine the failures of all endpoints into one.

        "No leader", or an unclear reason, is the failure of the call only if every endpoint returned it. Learners do
        not count for "no leader", since none of them can be the leader.
        """
        failures = [each for each in self._failures if each.text != etcd_errors.LEARNER] or self._failures
        if all(each.text == etcd_errors.NO_LEADER for each in failures):
            return failures[-1]
        if not any(is_about_server(each.status) for each in failures):
            return failures[-1]
        for each in reversed(failures):
            if is_about_server(each.status) and each.text != etcd_errors.NO_LEADER:
                return each
        return Failure(Status.UNAVAILABLE, f"some endpoints have no leader, one failed: {failures[-1].text}")
