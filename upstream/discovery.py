"""Finding the members of a cluster by DNS: SRV records, as etcd's tools read them.

`--discovery-srv=example.com` asks for `_etcd-client-ssl._tcp.example.com`, members with TLS, and for
`_etcd-client._tcp.example.com`, members without; a service name is appended to both (`_etcd-client-ssl-NAME`). As in
etcd's grpc-proxy, members without TLS are used only on request (`--insecure-discovery`): otherwise anyone who can
answer DNS queries for the domain could name any host. Unlike there, a member that is down is kept: it may come back.

Sources: etcd's client/pkg/srv/srv.go, server/etcdmain/grpc_proxy.go (discoverEndpoints).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from upstream.errors import UpstreamError

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver

TIMEOUT_S: Final = 5.0
"""How long the lookup of one name may take, all name servers and attempts together."""

_SERVICE: Final = "etcd-client"


class NotDiscovered(UpstreamError):
    """No member of a cluster could be found by DNS."""


def record_names(domain: str, service_name: str = "") -> dict[str, str]:
    """Return the names to look up, by the scheme of their members."""
    suffix = f"-{service_name}" if service_name else ""
    domain = domain.strip().rstrip(".")
    return {
        "https": f"_{_SERVICE}-ssl{suffix}._tcp.{domain}",
        "http": f"_{_SERVICE}{suffix}._tcp.{domain}",
    }


async def discover(
    domain: str, service_name: str = "", insecure: bool = False, resolver: Resolver | None = None
) -> list[str]:
    """Return the endpoints in a domain's SRV records, those with TLS first, each kind by priority and weight.

    `insecure`: include members without TLS. `resolver`: by default the system's. Raises NotDiscovered.
    """
    # Imported here: only discovery needs it.
    from dns.asyncresolver import get_default_resolver
    from dns.exception import DNSException
    from dns.resolver import NXDOMAIN, NoAnswer

    where = f"--discovery-srv={domain}"
    found: dict[str, list[str]] = {}
    problems: list[str] = []
    try:
        resolver = resolver or get_default_resolver()
        for scheme, name in record_names(domain, service_name).items():
            try:
                found[scheme] = await _lookup(resolver, name)
            except (NXDOMAIN, NoAnswer):
                found[scheme] = []
            except DNSException as error:
                problems.append(f"{name} cannot be looked up ({error})")
    except DNSException as error:
        raise NotDiscovered(where, f"DNS cannot be used ({error})", "check the domain and /etc/resolv.conf") from None
    secure, plain = found.get("https", []), found.get("http", [])
    endpoints = [f"https://{target}" for target in secure]
    if insecure:
        endpoints += [f"http://{target}" for target in plain]
    if endpoints:
        return endpoints
    if problems:
        raise NotDiscovered(where, " and ".join(problems), "check the name server")
    if plain:
        to_do = "name members with TLS there, or take these with --insecure-discovery"
        raise NotDiscovered(where, f"it names only members without TLS ({', '.join(plain)})", to_do)
    names = " or ".join(record_names(domain, service_name).values())
    raise NotDiscovered(where, f"there is no SRV record {names}", "check the domain and --discovery-srv-name")


async def _lookup(resolver: Resolver, name: str) -> list[str]:
    """Return the targets of a name's SRV records as HOST:PORT. Raises DNSException."""
    from dns.rdtypes.IN.SRV import SRV

    answer = await resolver.resolve(name, "SRV", lifetime=TIMEOUT_S, search=True)
    records: Sequence[object] = answer.rrset.processing_order() if answer.rrset is not None else ()
    targets = []
    for record in records:
        assert isinstance(record, SRV)
        host = record.target.to_text(omit_final_dot=True)
        # The root as a target means that the service is not available (RFC 2782).
        if host not in ("", "."):
            targets.append(f"{host}:{record.port}")
    return targets
