"""Why an address cannot be listened on, as one line: the reason and the remedy."""

from __future__ import annotations

import errno
import os
import socket

from proxy.config.values import Address
from proxy.errors import Failed

PRIVILEGED_BELOW = 1024
"""Ports below it need a privilege, unless net.ipv4.ip_unprivileged_port_start is lower."""


def cannot_listen(address: Address, flag: str, error: OSError) -> Failed:
    """Return the error for an address that cannot be listened on.

    `error.filename`: the address that failed, if a name has several.
    """
    reason, to_do = _explain(address, flag, error)
    where = str(address)
    if not address.path and isinstance(error.filename, str) and error.filename != where:
        where = f"{where} ({error.filename})"
    return Failed(f"cannot listen on {where}: {reason}; {to_do}")


def _explain(address: Address, flag: str, error: OSError) -> tuple[str, str]:
    another = f"choose another {flag}"
    if isinstance(error, socket.gaierror):
        return "the name cannot be resolved", f"check the spelling, or give an IP address in {flag}"
    match error.errno:
        case errno.EADDRINUSE:
            return "it is in use", f"stop what uses it or {another}" + ("" if address.path else " (port 0: any)")
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address", f"give one of its own, or :{address.port} for all, in {flag}"
        case errno.EACCES if not address.path and address.port < PRIVILEGED_BELOW:
            return (
                f"port {address.port} is forbidden",
                f"give a port from {PRIVILEGED_BELOW} on, or CAP_NET_BIND_SERVICE",
            )
        case errno.EACCES | errno.EPERM:
            return "permission denied", f"check who may write to its directory, or {another}"
        case errno.EEXIST:
            return "a file that is not a socket exists there", f"remove it or {another}"
        case errno.ENOENT if address.path:
            return "its directory does not exist", f"create it or {another}"
    return os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error), another
