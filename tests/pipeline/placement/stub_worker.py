"""A worker that computes nothing: it listens, and tells whoever connects which process it is."""

import itertools
import os
import select
import socket
import sys
import time
from pathlib import Path


def main():
    words = sys.argv[1:]
    given = dict(itertools.pairwise(words))
    if "--refuse" in words:
        print("failed no weights here", flush=True)
        raise SystemExit(2)
    listeners = [bound(given[flag]) for flag in ("--control-listen", "--data-in-listen")]
    print("loaded 1 2", flush=True)
    while (awaited := given.get("--load-until")) and not os.path.exists(awaited):  # noqa: PTH110
        time.sleep(0.01)
    print("listening", *map(named, listeners), flush=True)
    while True:
        for each in select.select([*listeners, sys.stdin], [], [])[0]:
            if each is sys.stdin:  # whoever started it is gone
                if not os.read(0, 1 << 16):
                    return
                continue
            connection, _ = each.accept()
            with connection:
                connection.sendall(str(os.getpid()).encode())


def bound(address):
    kind, _, rest = address.partition(":")
    if kind == "unix":
        if os.path.exists(rest):  # noqa: PTH110 - imports count, of a process started so often
            os.unlink(rest)  # noqa: PTH108
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(rest)
    else:
        host, _, port = rest.rpartition(":")
        sock = socket.socket()
        sock.bind((host, int(port)))
    sock.listen()
    return sock


def named(listener):
    name = listener.getsockname()
    return f"unix:{name}" if isinstance(name, str) else f"tcp:{name[0]}:{name[1]}"


if __name__ == "__main__":
    if not sys.argv[1:]:  # it is what workers are forks of
        sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
        from pipeline.placement.fork_server import fork_for_requests

        sys.argv[1:] = fork_for_requests()
    main()
