"""A tour with OpenStack's etcd3gw (the JSON gateway over HTTP/1). Arguments: HOST PORT [CA CERT KEY].

Prints what it saw.
"""

import json
import sys

from etcd3gw.client import Etcd3Client


def say(*what):
    print(
        json.dumps(what, default=lambda value: value.decode() if isinstance(value, bytes) else repr(value)), flush=True
    )


def main(host, port, ca=None, cert=None, key=None):
    client = Etcd3Client(
        host=host,
        port=int(port),
        protocol="https" if ca else "http",
        ca_cert=ca,
        cert_cert=cert,
        cert_key=key,
        api_path="/v3/",
        timeout=10,
    )
    say("put", client.put("k/a", "1"))
    client.put("k/b", "2")
    say("get", client.get("k/a"))
    say("prefix", [value for value, _ in client.get_prefix("k/")])
    say("replace", client.replace("k/a", "1", "3"), client.replace("k/a", "1", "4"))
    lease = client.lease(ttl=60)
    client.put("leased", "x", lease=lease)
    say("lease", lease.keys())
    lease.revoke()
    say("revoked", client.get("leased"))
    events, cancel = client.watch("w/one")
    client.put("w/one", "1")
    client.delete("w/one")
    found = [next(events) for _ in range(2)]
    say("watch", [(event.get("type", "PUT"), event["kv"]["key"], event["kv"].get("value")) for event in found])
    cancel()
    with client.lock("tour", ttl=10) as lock:
        say("lock", lock.is_acquired())
    say("status", client.status()["version"])


main(*sys.argv[1:])
