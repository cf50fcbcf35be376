"""llama.cpp over its own RPC: llama_cpp_rpc.py SERVER LLAMA_CPP MODEL.gguf THREADS [CPU ...].

Starts two RPC servers on loopback (in the clear: it knows no other way), each with THREADS, on the
CPUs if any are given, and lets llama_cpp, which speaks the protocol, split the layers over them.
"""

import socket
import subprocess
import sys
from contextlib import ExitStack
from time import sleep

CONNECT_TRIES = 100
SERVERS = 2


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [sock.getsockname()[1] for sock in sockets]


def wait_for(port: int) -> None:
    for _ in range(CONNECT_TRIES):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            sleep(0.05)
        else:
            return
    raise SystemExit(f"no RPC server at port {port}")


def main() -> None:
    server, llama_cpp, model, threads, *cpus = sys.argv[1:]
    pinning = ["taskset", "-c", ",".join(cpus)] if cpus else []
    ports = free_ports(SERVERS)
    servers = []
    try:
        for port in ports:
            command = [
                *pinning,
                server,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--threads",
                threads,
            ]
            servers.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            )
        for port in ports:
            wait_for(port)
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        client = subprocess.run([llama_cpp, model, threads, addresses], check=False)
        raise SystemExit(client.returncode)
    finally:
        for process in servers:
            process.kill()


if __name__ == "__main__":
    main()
