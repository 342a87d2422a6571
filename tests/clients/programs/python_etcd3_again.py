"""A watch with PyPI's etcd3 that starts again whenever it fails, as a careful application does. Arguments: HOST PORT.

Prints "watching" for each start and the value of each put, one a line, until killed.
"""

import sys
import time

import etcd3


def main(host, port):
    while True:
        try:
            client = etcd3.client(host=host, port=int(port), timeout=10)
            events, _ = client.watch_prefix("w/")
            print("watching", flush=True)
            for event in events:
                print(event.value.decode(), flush=True)
        except Exception as error:
            print("failed", type(error).__name__, flush=True)
            time.sleep(0.1)


main(*sys.argv[1:])
