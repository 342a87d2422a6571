"""
What an advertised URL makes of etcd's list of members: each is reached through the proxy.

Clients that take their endpoints from the cluster (clientv3's Sync and AutoSync, `etcdctl --cluster`) would go around
the proxy otherwise. etcd's grpc-proxy answers with one made-up member (server/proxy/grpcproxy/cluster.go); here ids,
names, peer URLs and learners stay etcd's, so that members can still be removed, updated and promoted by what the list
says. A member that has not started has no client URLs, and gets none. The answers to changes of members stay as they
are, as there: nobody takes endpoints from them.
"""

from __future__ import annotations

from proto.pb import rpc_pb2
from proxy.passthrough.translation import Rules, Translation

MEMBER_LIST = b"/etcdserverpb.Cluster/MemberList"


def rules(url: str) -> Rules:
    """Return the rules under which members have this client URL."""

    def advertise(message: rpc_pb2.MemberListResponse) -> None:
        for member in message.members:
            if member.clientURLs:
                member.clientURLs[:] = [url]

    response = rpc_pb2.MemberListResponse
    translation = Translation(rpc_pb2.MemberListRequest, response, None, {response.DESCRIPTOR.full_name: advertise})
    return Rules("--advertise-client-url", {MEMBER_LIST: translation})
