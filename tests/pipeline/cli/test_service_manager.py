"""What systemd hears, at a socket in its place."""

import os
import socket

import pytest
import trio

from pipeline.cli.service_manager import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A socket as systemd has it, and the environment it gives its services."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name if request.param == "path" else "\0" + name[1:])
        sock.setblocking(False)
        yield sock, {"NOTIFY_SOCKET": name if request.param == "path" else f"@{name[1:]}"}


def heard(sock):
    lines = []
    while True:
        try:
            lines += sock.recv(4096).decode().split("\n")
        except BlockingIOError:
            return lines


async def test_it_hears_when_a_service_is_ready_and_when_it_stops(manager, autojump_clock):
    sock, environment = manager
    is_ready = False
    service = ServiceManager(environment)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.keep_informed, lambda: is_ready)
        await trio.sleep(30)
        assert "READY=1" not in heard(sock)
        is_ready = True
        await trio.sleep(30)
        assert heard(sock).count("READY=1") == 1
        service.stopping()
        assert "STOPPING=1" in heard(sock)
        nursery.cancel_scope.cancel()


async def test_its_watchdog_is_fed_twice_as_often_as_it_asks(manager, autojump_clock):
    sock, environment = manager
    environment |= {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}
    service, lines = ServiceManager(environment), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.keep_informed, lambda: True)
        for _ in range(10):
            await trio.sleep(1)
            lines += heard(sock)
        nursery.cancel_scope.cancel()
    assert lines.count("WATCHDOG=1") >= 19
    assert lines.count("READY=1") == 1


async def test_a_service_of_nobodys_says_nothing():
    await ServiceManager({}).keep_informed(lambda: True)
    ServiceManager({}).stopping()


async def test_a_manager_that_is_gone_or_takes_nothing_keeps_nobody_waiting(
    manager, autojump_clock
):
    sock, environment = manager
    service = ServiceManager(environment)
    while service.tell("STATUS=1"):
        pass  # until its queue is full
    with trio.move_on_after(10) as scope:
        await service.keep_informed(lambda: True)
    assert scope.cancelled_caught
    sock.close()
    service.stopping()


@pytest.mark.parametrize("text", ["0", "-1", "soon", "²", "9" * 5000, str(1 << 64)])
async def test_a_watchdog_that_asks_for_no_time_is_none(manager, autojump_clock, text):
    sock, environment = manager
    service = ServiceManager(environment | {"WATCHDOG_USEC": text})
    with trio.fail_after(5):
        await service.keep_informed(lambda: True)
    assert heard(sock) == ["READY=1"]
