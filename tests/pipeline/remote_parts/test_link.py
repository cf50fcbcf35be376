"""Questions to a worker over a real channel: answers in order, refusals, losses, two lanes."""

import threading
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio

from pipeline.agreement.trust_policy import DevTrust
from pipeline.errors import PartLost, PartRefused
from pipeline.remote_parts.lanes import Lanes
from pipeline.remote_parts.link import PartLink
from pipeline.remote_parts.parts import PART
from pipeline.remote_parts.serving import PartServer
from pipeline.remote_parts.wire import PartRefusal, to_array, to_tensor
from transport.channel import connect_channel
from transport.dial_and_listen import TcpEndpoint, dial, listen
from transport.handshake import Link, LinkKind, Role, RoleKind
from transport.tensor_frames import FrameLimits

LIMITS = FrameLimits(1 << 12, 4, 1 << 24)
STAGE = Role(RoleKind.STAGE, 0)
LINK = Link(LinkKind.DATA, STAGE, PART, bytes(32))


class Doubling:
    """Answers twice what it is sent, after as many milliseconds as the header says."""

    def __init__(self):
        self.is_closed = False

    def answer(self, header, tensors):
        if header == b"no":
            raise PartRefusal("its memory is full")
        if header == b"defect":
            raise ZeroDivisionError
        time.sleep(int(header or 0) / 1000)
        return header, tuple(to_tensor(2 * to_array(each)) for each in tensors)

    def close(self):
        self.is_closed = True


class Handlers(list):
    """Of each session; and what the same peer begins another by."""


@asynccontextmanager
async def linked(directory, patience=5.0):
    """A link to a worker in this process, and its handlers."""
    handlers, lanes = Handlers(), Lanes()

    def new_handler():
        handlers.append(Doubling())
        return handlers[-1]

    trusts = [DevTrust.create(directory) for _ in range(2)]
    server = PartServer(LINK, trusts[0].toward(STAGE, {}), LIMITS, new_handler)
    with listen(TcpEndpoint("127.0.0.1", 0)) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)

            async def connect():
                sock = await dial(listener.endpoint)
                return await connect_channel(sock, LINK, trusts[1].toward(PART, {}), LIMITS)

            handlers.dial_again = connect
            channel = await connect()
            link = PartLink(channel.taken_over(patience), "the worker", lanes)
            yield link, lanes, handlers
            await trio.to_thread.run_sync(link.close)
            nursery.cancel_scope.cancel()


def in_thread(work, *args):
    return trio.to_thread.run_sync(work, *args)


@pytest.mark.parametrize("rows", [1, 300_000])
async def test_an_answer_is_that_to_the_question(tmp_path, rows):
    async with linked(tmp_path) as (link, _, _):
        for factor in range(3):
            sent = np.arange(rows, dtype=np.float32) * factor
            header, (tensor,) = await in_thread(link.ask, b"0", (to_tensor(sent),))
            assert header == b"0"
            assert np.array_equal(to_array(tensor), 2 * sent)
    assert link.num_asked == 3


async def test_answers_stay_whole_when_others_come(tmp_path):
    async with linked(tmp_path) as (link, _, _):
        asks = [
            (await in_thread(link.ask, b"0", (to_tensor(np.full(8, each, np.uint64)),)))[1][0]
            for each in range(3)
        ]
    assert [to_array(each)[0] for each in asks] == [0, 2, 4]


async def test_one_lane_computes_while_the_others_question_is_away(tmp_path):
    order, computing = [], set()

    async with linked(tmp_path) as (link, lanes, _):

        def work(name):
            for turn in range(3):
                computing.add(name)
                assert len(computing) == 1
                time.sleep(0.002)
                order.append(f"{name}{turn}")
                computing.discard(name)
                sent = np.full(4, ord(name) + turn, np.int64)
                _, (answer,) = link.ask(b"20", (to_tensor(sent),))
                assert np.array_equal(to_array(answer), 2 * sent)
            return name

        found = await in_thread(lanes, [lambda: work("a"), lambda: work("b")])
    assert found == ["a", "b"]
    assert set(order[:2]) == {"a0", "b0"}
    assert set(order[2:4]) == {"a1", "b1"}


async def test_a_failure_of_one_lane_ends_the_other(tmp_path):
    async with linked(tmp_path) as (link, lanes, _):
        works = [lambda: link.ask(b"no"), lambda: link.ask(b"0")]
        with pytest.raises((PartRefused, PartLost)):
            await in_thread(lanes, works)
        assert threading.active_count() < 20


async def test_a_refusal_is_told_in_one_line(tmp_path):
    async with linked(tmp_path) as (link, _, handlers):
        with pytest.raises(PartRefused, match=r"^the worker refuses: its memory is full$"):
            await in_thread(link.ask, b"no")
    assert handlers[0].is_closed


async def test_a_defect_of_the_worker_says_no_content(tmp_path):
    async with linked(tmp_path) as (link, _, _):
        with pytest.raises(PartRefused, match=r"internal error \(ZeroDivisionError\)$"):
            await in_thread(link.ask, b"defect")


async def test_a_worker_that_goes_is_lost(tmp_path):
    async with linked(tmp_path) as (link, _, handlers):
        await in_thread(link.ask, b"0")
        handlers[0].answer = None  # whatever it does next fails
        with pytest.raises((PartLost, PartRefused)):
            await in_thread(link.ask, b"0")
        with pytest.raises(PartLost, match="the worker is lost"):
            await in_thread(link.ask, b"0")


async def test_who_comes_again_has_lost_the_session_before(tmp_path):
    """What that had is free at once, though nobody has said that it is over."""
    async with linked(tmp_path) as (link, _, handlers):
        await in_thread(link.ask, b"0")
        channel = await handlers.dial_again()
        again = PartLink(channel.taken_over(5), "the worker", Lanes())
        await in_thread(again.ask, b"0")
        assert [each.is_closed for each in handlers] == [True, False]
        with pytest.raises(PartLost):
            await in_thread(link.ask, b"0")
        await in_thread(again.close)


async def test_a_silent_worker_is_lost(tmp_path):
    async with linked(tmp_path, patience=0.1) as (link, _, _handlers):
        await in_thread(link.ask, b"0")
        with pytest.raises(PartLost, match=r"silent for 0\.1 s"):
            await in_thread(link.ask, b"400")


async def test_a_closed_link_is_lost_at_once(tmp_path):
    async with linked(tmp_path, patience=3600) as (link, _, _):
        await in_thread(link.ask, b"0")
        await in_thread(link.close)
        with pytest.raises(PartLost):
            await in_thread(link.ask, b"0")


async def test_what_is_done_meanwhile_is_done_before_the_answer_is_read(tmp_path):
    order = []
    async with linked(tmp_path) as (link, _, _):
        sent = to_tensor(np.arange(4, dtype=np.float32))
        await in_thread(link.ask, b"0", (sent,), lambda: order.append(link.num_bytes))
        order.append(link.num_bytes)
    (sent_by_then, received_by_then), (all_sent, all_received) = order
    assert sent_by_then == all_sent > 0
    assert received_by_then < all_received
