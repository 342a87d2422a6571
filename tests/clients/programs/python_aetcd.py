"""A tour with PyPI's aetcd (asyncio, grpc.aio). Arguments: HOST PORT. Prints one JSON line for each result."""

import asyncio
import json
import sys

import aetcd


def say(*what):
    print(
        json.dumps(what, default=lambda value: value.decode() if isinstance(value, bytes) else repr(value)), flush=True
    )


def shown(event):
    previous = event.prev_kv.value if event.prev_kv is not None else None
    return [str(event.kind), event.kv.key, event.kv.value, event.kv.mod_revision, previous]


async def take(watch, count):
    found = []
    async for event in watch:
        found.append(shown(event))
        if len(found) == count:
            break
    return found


async def main(host, port):
    async with aetcd.Client(host=host, port=int(port), timeout=10) as client:
        await client.put(b"k/a", b"1")
        await client.put(b"k/b", b"2")
        say("get", (await client.get(b"k/a")).value)
        say("prefix", [(kv.key, kv.value) for kv in await client.get_prefix(b"k/")])
        say("replace", await client.replace(b"k/a", b"1", b"3"), await client.replace(b"k/a", b"1", b"4"))
        lease = await client.lease(60)
        await client.put(b"leased", b"x", lease=lease)
        await lease.refresh()
        await lease.revoke()
        say("revoked", await client.get(b"leased"))
        one = await client.watch(b"w/one", prev_kv=True)
        more = await client.watch_prefix(b"w/", kind=aetcd.EventKind.PUT)
        past = await client.watch_prefix(b"k/", start_revision=2)
        await client.put(b"w/one", b"1")
        await client.put(b"w/two", b"2")
        await client.delete(b"w/one")
        await client.put(b"w/one", b"3")
        say("watch", await asyncio.wait_for(take(one, 3), 10))
        say("filtered", await asyncio.wait_for(take(more, 3), 10))
        say("past", await asyncio.wait_for(take(past, 3), 10))
        for watch in (one, more, past):
            await watch.cancel()
        say("status", (await client.status()).version)


asyncio.run(main(*sys.argv[1:]))
