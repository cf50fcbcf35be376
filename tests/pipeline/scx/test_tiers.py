"""Layers of an encoded cache on disk and with an attention worker: the same logits."""

import socket
from functools import partial
from threading import Thread

import pytest
import torch
import trio

from pipeline.agreement.manifest import dump_manifest
from pipeline.agreement.trust_policy import DevTrust
from pipeline.errors import InputError
from pipeline.planning.plan import PlanOptions, plan
from pipeline.remote_parts import dialing
from pipeline.remote_parts.parts import part_link
from pipeline.remote_parts.serving import PartServer
from pipeline.scx import (
    AnswerRefused,
    AttentionTier,
    CacheRefused,
    EncodedKVCache,
    ScxError,
    encode_llama,
    split_kvcache_dynamic,
)
from pipeline.scx.attention_wire import QUESTION_LIMITS
from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker
from tests.pipeline.scx.test_attention_parts import Near
from tests.pipeline.scx.test_llama import encoded_logits, keys_of, llama, plain_logits, prompt_of
from transport.dial_and_listen import TcpEndpoint, listen
from transport.handshake import Role, RoleKind

STEPS = 6
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def tier(max_rows=64, memory=None):
    return AttentionTier(Near(AttentionWorker(AttentionMemory(memory))), max_rows)


@pytest.mark.parametrize("settings", [{}, {"redundant_num": 5}, {"one_time": True}], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["one text", "unequal lengths"])
@pytest.mark.parametrize("where", ["disk", "elsewhere", "all"])
def test_logits_are_those_of_a_plain_cache(tmp_path, where, mask, settings):
    prompt = prompt_of(1 if mask is None else len(mask))
    expected, tokens = plain_logits(llama(), prompt, STEPS, mask)
    model = encode_llama(llama(), keys_of(**settings, batch_size=2))
    disk = f"disk:{tmp_path}"
    placement = {
        "disk": {0: "disk", 1: disk}, "elsewhere": dict.fromkeys((0, 2), tier()),
        "all": {0: disk, 1: tier(), 2: "memory"},
    }[where]  # fmt: skip
    logits = encoded_logits(model, prompt, tokens, mask, placement)
    assert (logits - expected).abs().max() < 1e-4
    assert not list(tmp_path.iterdir())  # files go with their layers


def test_a_disk_that_is_full_says_so(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    cache = encode_llama(llama(), keys_of())(prompt_of(), mode="prefill").past_key_values
    with pytest.raises(ScxError, match=r"does not fit on disk: .*No space left"):
        split_kvcache_dynamic(cache, {1: "disk"})


def test_rows_altered_on_disk_are_refused():
    model = encode_llama(llama(), keys_of())
    prompt = prompt_of()
    cache = model(prompt, mode="prefill").past_key_values
    gpu, cpu = split_kvcache_dynamic(cache, {1: "disk"})
    gpu.layers[1].room[0, 0, 0, 3, 0] += 1
    with pytest.raises(CacheRefused):
        model(input_ids=prompt[:, :1], mode="decode", gpu_kvcache=gpu, cpu_kvcache=cpu)


def test_a_worker_that_is_full_says_so():
    cache = encode_llama(llama(), keys_of())(prompt_of(), mode="prefill").past_key_values
    with pytest.raises(ScxError, match=r"the tier cannot be had: .* left of its memory"):
        split_kvcache_dynamic(cache, {1: tier(memory=1000)})


@pytest.fixture
def served(tiny_model, tmp_path, monkeypatch):
    """A manifest, and the worker that it names in a thread."""
    monkeypatch.setenv("VEILPIPE_DEV_DIR", str(tmp_path / "dev"))
    with listen(TcpEndpoint("127.0.0.1", 0)) as listener:
        manifest = plan(tiny_model, PlanOptions(1, part=("attention", listener.endpoint, None)))
        path = tmp_path / "manifest.json"
        path.write_text(dump_manifest(manifest))
        credentials = DevTrust.create(tmp_path / "dev").toward(Role(RoleKind.STAGE, 0), {})
        server = PartServer(
            part_link(manifest), credentials, QUESTION_LIMITS,
            lambda: AttentionWorker(AttentionMemory(None)),
        )  # fmt: skip
        thread = Thread(target=trio.run, args=(partial(server.serve, listener, once=True),))
        thread.start()
        yield path
        thread.join()


def test_a_worker_is_named_by_a_manifest(served):
    prompt = prompt_of()
    expected, tokens = plain_logits(llama(), prompt, STEPS)
    model = encode_llama(llama(), keys_of())
    place = AttentionTier.dial(served, 64, dev=True)
    try:
        logits = encoded_logits(model, prompt, tokens, None, dict.fromkeys((0, 2), place))
    finally:
        place.close()
    assert (logits - expected).abs().max() < 1e-4


def test_a_worker_that_cannot_be_had_is_one_clear_error(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("VEILPIPE_DEV_DIR", str(tmp_path / "dev"))
    monkeypatch.setattr(dialing, "CONNECT_SECONDS", 0)
    path = tmp_path / "manifest.json"
    path.write_text(dump_manifest(plan(tiny_model, PlanOptions(1))))
    with pytest.raises(InputError, match="has no part of kind attention; plan it"):
        AttentionTier.dial(path, 64, dev=True)
    with socket.socket() as nobody:  # bound, and listening to nobody
        nobody.bind(("127.0.0.1", 0))
        where = TcpEndpoint("127.0.0.1", nobody.getsockname()[1])
        part = ("attention", where, None)
        path.write_text(dump_manifest(plan(tiny_model, PlanOptions(1, part=part))))
        with pytest.raises(ScxError, match="the tier cannot be had: the attention worker of"):
            AttentionTier.dial(path, 64, dev=True)
    with pytest.raises(InputError, match="cannot read key file"):
        AttentionTier.dial(path, 64, identity=tmp_path / "none")


def test_a_disk_that_fills_up_while_decoding_leaves_the_cache_as_it_was(monkeypatch):
    model = encode_llama(llama(), keys_of())
    prompt = prompt_of()
    expected, tokens = plain_logits(llama(), prompt, 2 * prompt.shape[1])
    cache = model(prompt, mode="prefill").past_key_values
    gpu, cpu = split_kvcache_dynamic(cache, {1: "disk"})
    caches = {"gpu_kvcache": gpu, "cpu_kvcache": cpu}

    def full(*_):
        raise OSError(28, "No space left on device")

    logits, failures = [], []
    for token in tokens.split(1, 1):
        with monkeypatch.context() as patched:
            patched.setattr("os.posix_fallocate", full)
            try:
                logits.append(model(input_ids=token, mode="decode", **caches).logits[:, -1])
                continue
            except ScxError as error:
                failures.append(str(error))
        logits.append(model(input_ids=token, mode="decode", **caches).logits[:, -1])
    (failure,) = failures  # the file was made for twice the prompt
    assert "does not fit on disk" in failure
    assert (torch.stack(logits, 1) - expected[:, 1:]).abs().max() < 1e-4


def test_what_lies_elsewhere_cannot_be_written_from_here(tmp_path):
    cache = encode_llama(llama(), keys_of())(prompt_of(), mode="prefill").past_key_values
    elsewhere, _ = split_kvcache_dynamic(cache, {1: tier()})
    with pytest.raises(ScxError, match="layer 1 lies elsewhere"):
        elsewhere.save(tmp_path / "cache")
    assert isinstance(elsewhere, EncodedKVCache)


def test_a_worker_that_refuses_in_the_midst_ends_the_step():
    model = encode_llama(llama(), keys_of())
    prompt = prompt_of()
    place = tier(max_rows=prompt.shape[1])
    gpu, cpu = split_kvcache_dynamic(model(prompt, mode="prefill").past_key_values, {1: place})
    with pytest.raises(AnswerRefused, match="is none"):
        model(input_ids=prompt[:, :1], mode="decode", gpu_kvcache=gpu, cpu_kvcache=cpu)
