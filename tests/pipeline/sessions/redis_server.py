"""A Redis server of the test's own."""

import os
import shutil
import socket
import subprocess
import time


class RedisServer:
    """A server on a socket in a directory; it keeps what it acknowledges, across deaths."""

    def __init__(self, directory, *options):
        self.socket = directory / "redis"
        self.url = f"unix://{self.socket}"
        self._options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(directory)]
        self._options += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *options]
        self.process = None

    def start(self, **environment):
        """Returns when it answers, or has died."""
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [shutil.which("redis-server"), *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        deadline = time.monotonic() + 120
        while self.process.poll() is None and not self.ask("PING").startswith(b"+PONG"):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ask(self, command):
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.socket))
                sock.sendall(f"{command}\r\n".encode())
                return sock.recv(64)
            except OSError:
                return b""

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
