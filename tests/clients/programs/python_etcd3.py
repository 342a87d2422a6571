"""A tour with PyPI's etcd3 (synchronous, grpc's C core). Arguments: HOST PORT [CA CERT KEY].

Prints one JSON line for each result.

Runs in a separate environment: the library needs an old protobuf.
"""

import json
import sys

import etcd3


def say(*what):
    print(
        json.dumps(what, default=lambda value: value.decode() if isinstance(value, bytes) else repr(value)), flush=True
    )


def shown(event):
    return [type(event).__name__, event.key, event.value, event.prev_value]


def main(host, port, ca=None, cert=None, key=None):
    client = etcd3.client(host=host, port=int(port), timeout=10, ca_cert=ca, cert_cert=cert, cert_key=key)
    client.put("k/a", "1")
    client.put("k/b", "2")
    say("get", client.get("k/a")[0])
    say("prefix", sorted((metadata.key, value) for value, metadata in client.get_prefix("k/")))
    say("replace", client.replace("k/a", "1", "3"), client.replace("k/a", "1", "4"))
    say(
        "txn",
        client.transaction(
            compare=[client.transactions.value("k/a") == "3"],
            success=[client.transactions.put("k/a", "5"), client.transactions.get("k/b")],
            failure=[],
        )[0],
    )
    lease = client.lease(60)
    client.put("leased", "x", lease=lease)
    say("lease", lease.granted_ttl, lease.keys)
    lease.refresh()
    lease.revoke()
    say("revoked", client.get("leased")[0])

    events, cancel = client.watch("w/one", prev_kv=True)
    more, cancel_more = client.watch_prefix("w/")
    past, cancel_past = client.watch_prefix("k/", start_revision=2)
    client.put("w/one", "1")
    client.put("w/two", "2")
    client.delete("w/one")
    client.put("w/one", "3")
    say("watch", [shown(next(events)) for _ in range(3)])
    say("prefixed", [shown(next(more)) for _ in range(4)])
    say("past", [shown(next(past)) for _ in range(4)])
    for stop in (cancel, cancel_more, cancel_past):
        stop()
    with client.lock("tour", ttl=10) as lock:
        say("lock", lock.is_acquired())
    client.compact(3)
    try:
        late, _ = client.watch("k/a", start_revision=1)
        say("late", shown(next(late)))
    except etcd3.exceptions.RevisionCompactedError as error:
        say("compacted", error.compacted_revision)
    say("members", [member.name for member in client.members])
    say("status", client.status().version)
    client.close()


main(*sys.argv[1:])
