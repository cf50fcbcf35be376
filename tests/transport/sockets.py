"""Bytes from a socket that does not block."""

import trio


async def receive(sock, num_bytes):
    data = b""
    while len(data) < num_bytes:
        await trio.lowlevel.wait_readable(sock)
        chunk = sock.recv(num_bytes - len(data))
        if not chunk:
            break
        data += chunk
    return data
