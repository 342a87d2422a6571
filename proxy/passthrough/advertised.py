"""Translation of MemberList responses: every member gets the advertised URL as its client URL.

Otherwise clients that take their endpoints from the cluster (clientv3's Sync and AutoSync, `etcdctl --cluster`) would
bypass the proxy. etcd's grpc-proxy answers with one made-up member (server/proxy/grpcproxy/cluster.go); here ids,
names, peer URLs and learners stay as in etcd, so that members can still be removed, updated and promoted by the list's
ids. A member that has not started has no client URLs, and gets none. Responses to membership changes are not
translated, as in grpc-proxy: clients do not take endpoints from them.
"""

from __future__ import annotations

from proto.pb import rpc_pb2
from proxy.passthrough.translation import Translation, TranslationRules

MEMBER_LIST = b"/etcdserverpb.Cluster/MemberList"


def rules(url: str) -> TranslationRules:
    """Return the rules that give all members this client URL."""

    def advertise(message: rpc_pb2.MemberListResponse) -> None:
        for member in message.members:
            if member.clientURLs:
                member.clientURLs[:] = [url]

    response = rpc_pb2.MemberListResponse
    translation = Translation(rpc_pb2.MemberListRequest, response, None, {response.DESCRIPTOR.full_name: advertise})
    return TranslationRules("--advertise-client-url", {MEMBER_LIST: translation})
