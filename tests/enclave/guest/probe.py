"""Runs inside an enclave under test: answers one JSON line per connection on vsock port 5000."""

from __future__ import annotations

import importlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

from enclave import nsm

PORT = 5000
LOOPBACK_PORT = 5001
LOOPBACK_CID = 1
# QEMU's host end; on AWS it is CID 3.
EMULATED_PARENT_CID = 2
PARENT_PORT = 7000


def main() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, PORT))
        listener.listen()
        print("probe: listening", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as stream:
                request = json.loads(stream.readline())
                if request["op"] == "echo":
                    stream.write(stream.read(request["bytes"]))
                else:
                    stream.write(json.dumps(answer(request)).encode() + b"\n")


def answer(request: dict[str, Any]) -> Any:
    match request["op"]:
        case "describe":
            return nsm.call("DescribeNSM")
        case "registers":
            return {index: nsm.describe_pcr(index).hex() for index in (0, 1, 2, 8)}
        case "random":
            return nsm.random_bytes().hex()
        case "attest":
            names = ("nonce", "user_data", "public_key")
            return nsm.attestation_document(*(bytes.fromhex(request[name]) for name in names)).hex()
        case "import":
            return [importlib.import_module(name).__name__ for name in request["modules"]]
        case "loopback":
            return loopback(request["bytes"])
        case "dial_parent":
            return dial_parent(request["bytes"])
        case "system":
            return {
                "time": time.time(),
                "entropy_bits": int(Path("/proc/sys/kernel/random/entropy_avail").read_text()),
                "interfaces": Path("/proc/net/dev").read_text(),
                "is_first_process_init": b"/init" in Path("/proc/1/cmdline").read_bytes(),
                "stage_files": sorted(path.name for path in Path("/stage").iterdir()),
            }
    raise ValueError(request["op"])


def loopback(num_bytes: int) -> int:
    """Send bytes to a thread of this process over AF_VSOCK; return how many came back."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK_CID, LOOPBACK_PORT))
        listener.listen()
        thread = threading.Thread(target=echo_once, args=(listener,))
        thread.start()
        with dial() as client:
            sender = threading.Thread(target=send_all, args=(client, num_bytes))
            sender.start()
            received = 0
            while chunk := client.recv(1 << 16):
                received += len(chunk)
            sender.join()
        thread.join()
    return received


def dial_parent(num_bytes: int) -> int:
    """Send bytes to the parent; return how many it says it got."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as parent:
        parent.connect((EMULATED_PARENT_CID, PARENT_PORT))
        parent.sendall(bytes(num_bytes))  # no half-close: vhost-device-vsock makes it a whole one
        return int.from_bytes(parent.recv(8), "big")


def dial() -> socket.socket:
    client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    client.connect((LOOPBACK_CID, LOOPBACK_PORT))
    return client


def send_all(client: socket.socket, num_bytes: int) -> None:
    client.sendall(bytes(num_bytes))
    client.shutdown(socket.SHUT_WR)


def echo_once(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while chunk := connection.recv(1 << 16):
            connection.sendall(chunk)


main()
