"""A watch with PyPI's aetcd that starts again whenever it fails, as a careful application does. Arguments: HOST PORT.

Prints "watching" for each start and the value of each put, one a line, until killed.
"""

import asyncio
import sys

import aetcd


async def main(host, port):
    while True:
        try:
            client = aetcd.Client(host=host, port=int(port), timeout=10)
            events = await client.watch_prefix(b"w/")
            print("watching", flush=True)
            async for event in events:
                print(event.kv.value.decode(), flush=True)
        except Exception as error:
            print("failed", type(error).__name__, flush=True)
            await asyncio.sleep(0.1)


asyncio.run(main(*sys.argv[1:]))
