"""What somebody between home and a machine sees of pairing and of parts: nothing of either."""

import hashlib
import os

import trio

from pipeline.machines.offer_line import OfferLine
from pipeline.machines.visitor import Address, pairing, visiting
from tests.pipeline.conftest import Tap
from tests.pipeline.machines.conftest import SOFTWARE
from transport.dial_and_listen import TcpEndpoint, listen


async def yes(_):
    return True


async def test_neither_secret_nor_part_nor_key_is_seen(rig):
    data = os.urandom(1 << 20) + b"a part that anybody would know again" * 1000
    path = rig.directory / "part"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    tap = Tap()
    async with rig.machine("a", offers=yes, knows_home=False) as machine:
        with listen(TcpEndpoint("127.0.0.1", 0)) as front:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tap.serve, "control", front, machine.address.endpoint)
                line = OfferLine(front.endpoint, machine.line.key, machine.line.secret)
                async with pairing(line, rig.home) as visit:
                    await visit.join(SOFTWARE)
                async with visiting(Address(front.endpoint, line.key), rig.home) as visit:
                    await visit.put(digest, path)
                nursery.cancel_scope.cancel()
        assert machine.store.has(digest)
    seen = bytes(tap.seen)
    assert len(seen) > len(data)
    secrets = [
        line.secret,
        line.psk,
        rig.home_key,
        line.key,
        digest.encode(),
    ]
    secrets += [data[i : i + 16] for i in range(0, len(data) - 16, len(data) // 500)]
    assert not [secret for secret in secrets if secret in seen]
