"""A tour with Patroni, which uses the JSON gateway over HTTP/1: two members of one cluster, a leader and a follower.

Arguments: HOST PORT [CA CERT KEY]. Prints what it saw.
"""

import json
import sys

from patroni.dcs import get_dcs

WAIT_S = 20


def say(*what):
    print(json.dumps(what), flush=True)


def member(name, host, port, ca=None, cert=None, key=None):
    """One Patroni; `use_proxies`: it connects to the given address, and not to the members that etcd lists."""
    tls = {"protocol": "https", "cacert": ca, "cert": cert, "key": key} if ca else {}
    etcd = {"hosts": [f"{host}:{port}"], "use_proxies": True, **tls}
    return get_dcs({"scope": "tour", "name": name, "ttl": 30, "loop_wait": 10, "retry_timeout": 10, "etcd3": etcd})


def until(follower, seen):
    """Wait, woken by the follower's watch, until it sees something; return its view."""
    for _ in range(100):
        cluster = follower.get_cluster()
        if seen(cluster):
            return cluster
        if not follower.event.wait(WAIT_S):
            sys.exit("the watch did not wake the follower")
        follower.event.clear()
    sys.exit("not seen")


def main(*address):
    leader, follower = member("one", *address), member("two", *address)
    say("initialize", bool(leader.initialize()))
    say("leader", bool(leader.attempt_to_acquire_leader()))
    say("seen", until(follower, lambda cluster: not cluster.is_unlocked()).leader.name)
    say("config", leader.set_config_value(json.dumps({"ttl": 30})))
    say("member", leader.touch_member({"state": "running"}), follower.touch_member({"state": "running"}))
    say("update", leader.update_leader(leader.get_cluster(), 4711, None, None))
    say("deleted", leader.delete_leader(leader.get_cluster().leader))
    until(follower, lambda cluster: cluster.is_unlocked())
    say("failover", bool(follower.attempt_to_acquire_leader()))
    cluster = until(leader, lambda cluster: not cluster.is_unlocked())
    # Only now: a refusal by etcd makes Patroni drop its watch and read everything again.
    say("refused", bool(leader.initialize()), bool(leader.attempt_to_acquire_leader()))
    say("then", cluster.leader.name, sorted(each.name for each in cluster.members), cluster.config.data)


main(*sys.argv[1:])
