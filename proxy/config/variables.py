"""The WATCHMUX_* environment variables: which are known, and which others may be there without being a mistake.

An unknown or empty variable is an error: with WATCHMUX_ENDPOINT=... or WATCHMUX_ENDPOINTS= the proxy would run without
the setting that the operator meant to give.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from proxy.config.knobs import knobs
from proxy.config.values import ENV_PREFIX

CONFIG_ENV = ENV_PREFIX + "CONFIG"
STORE_ENV = tuple(ENV_PREFIX + name for name in ("STORE_LISTEN_ADDR", "STORE_LISTEN_METRICS_URLS", "STORE_DATA_DIR"))

# What the kubelet sets in every pod of the namespace of a Service named watchmux, or watchmux-NAME, unless the pod has
# enableServiceLinks: false (kubernetes pkg/kubelet/envvars/envvars.go): a pattern for the name and one for the value.
_OF_KUBERNETES = tuple(
    (re.compile(ENV_PREFIX + r"([A-Z0-9_]+_)?" + name), re.compile(value))
    for name, value in (
        ("SERVICE_HOST", r".+"),
        ("SERVICE_PORT(_[A-Z0-9_]+)?", r"\d+"),
        (r"PORT(_\d+_(TCP|UDP|SCTP))?", r"(tcp|udp|sctp)://.+"),
        (r"PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)", r".+"),
    )
)


def known() -> list[str]:
    """Return every variable that a command reads."""
    return [*(knob.env for knob in knobs()), CONFIG_ENV, *STORE_ENV]


def problems_of(environment: Mapping[str, str]) -> Iterable[str]:
    """Yield one line for each variable that is empty or unknown."""
    names = known()
    for name, value in sorted(environment.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        if name in names:
            if not value.strip():
                yield f"{name}: is set but empty; give it a value or unset it"
        elif not of_kubernetes(name, value):
            import difflib  # for mistakes only

            # Without the prefix, which is alike in all.
            own = {known.removeprefix(ENV_PREFIX): known for known in names}
            close = difflib.get_close_matches(name.removeprefix(ENV_PREFIX), own, 1)
            hint = f"did you mean {own[close[0]]}?" if close else "`watchmux config` lists those that exist"
            if name == ENV_PREFIX + "DEBUG":
                hint = f"set {ENV_PREFIX}LOG_LEVEL=debug"
            yield f"{name}: unknown environment variable; {hint}"


def of_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes sets such a variable for a Service."""
    return any(one.fullmatch(name) and other.fullmatch(value) for one, other in _OF_KUBERNETES)
