"""Attested pipelines: the user verifies stages, stages verify each other, a relay sees nothing.

The Nitro documents here are signed under a root of the test's own; all the rest is what runs in
production, AWS's root apart.
"""

from datetime import UTC, datetime
from functools import partial

import pytest
import torch

from pipeline.agreement.identity import create_identity, load_identity
from pipeline.agreement.trust_policy import (
    UserTrust,
    attested_verifier,
    software_measurement,
)
from pipeline.engine.limits import Limits
from pipeline.errors import PolicyError, SessionError
from pipeline.orchestrator.evidence_request import fetch_evidence
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.protocol.time_limits import TimeLimits
from transport.attestation.dev_authority import DevAuthority
from transport.attestation.document_verifier import examine
from transport.attestation.evidence_binding import Binding
from transport.errors import AttestationError


def windows(data, size=16):
    """Chunks of `data` that a capture would hold if any of it travelled in the clear."""
    step = max(1, (len(data) - size) // 64)
    return [data[i : i + size] for i in range(0, len(data) - size, step)]


async def test_an_attested_pipeline_generates_and_its_relay_sees_nothing(deployment):
    async with deployment.running() as (manifest, results):
        tokens = await deployment.generate(manifest, results)
    assert tokens == deployment.reference(12)
    seen = bytes(deployment.tap.seen)
    assert len(seen) > 20_000
    secrets = [
        b"".join(t.to_bytes(4, "little") for t in ids) for ids in (deployment.PROMPT, tokens)
    ]
    from safetensors.torch import load_file

    for tensor in load_file(deployment.model_dir / "model.safetensors").values():
        secrets.append(tensor.float().numpy().tobytes())
    # Activations after each layer, as they travel.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(deployment.model_dir, dtype=torch.float32)
    states = model(torch.tensor([deployment.PROMPT]), output_hidden_states=True).hidden_states
    secrets += [state.detach().numpy().tobytes() for state in states]
    for secret in secrets:
        assert not any(window in seen for window in windows(secret))


def test_the_search_would_find_what_travels_in_the_clear():
    secret = bytes(range(256)) * 4
    assert any(window in b"noise" + secret + b"noise" for window in windows(secret))


async def refused(deployment, *words):
    async with deployment.running() as (manifest, results):
        with pytest.raises(SessionError) as caught:
            await deployment.generate(manifest, results)
    for word in words:
        assert word in str(caught.value)
    # Nothing of the prompt can have left: no data channel ever stood.
    tokens = b"".join(t.to_bytes(4, "little") for t in deployment.PROMPT)
    assert tokens[:16] not in deployment.tap.seen


async def test_a_stage_with_another_measurement_is_refused(deployment):
    deployment.pcrs[1] = {**deployment.PCRS[1], 0: b"\x99" * 48}
    await refused(deployment, "stage 1", "pcr")


async def test_a_stage_in_debug_mode_is_refused(deployment):
    deployment.pcrs[0] = {**deployment.PCRS[0], 0: bytes(48)}
    await refused(deployment, "stage 0", "debug")


async def test_swapped_stages_are_refused(deployment):
    deployment.pcrs = [deployment.PCRS[1], deployment.PCRS[0]]
    await refused(deployment, "stage")


async def test_documents_of_another_root_are_refused(deployment):
    deployment.authority_of_stages = DevAuthority.create(datetime.now(UTC))
    genuine, deployment.authority = deployment.authority, deployment.authority_of_stages
    async with deployment.running() as (manifest, results):
        deployment.authority = genuine
        with pytest.raises(SessionError, match="root"):
            await deployment.generate(manifest, results)


async def test_an_orchestrator_whose_key_is_not_listed_is_refused(deployment, tmp_path):
    deployment.identity = tmp_path / "other.pem"
    create_identity(deployment.identity)
    await refused(deployment, "stage")


async def test_a_neighbour_with_another_measurement_is_refused_by_the_stage(deployment):
    """The user is deceived about stage 1; stage 0's neighbour still has to be the right one."""
    async with deployment.running() as (manifest, results):
        stages = list(manifest.stages)
        trust = UserTrust.create(manifest, deployment.identity, deployment.authority.root_cert)

        class Deceived:
            def toward(self, peer, measurements):
                return trust.toward(peer, deployment.PCRS[peer.stage_idx])

        wrong = {i: v.hex() for i, v in {**deployment.PCRS[1], 2: b"\x77" * 48}.items()}
        stages[1] = stages[1].model_copy(update={"expected_measurements": wrong})
        manifest = manifest.model_copy(update={"stages": tuple(stages)})
        limits = Limits(1, 256)
        options = PipelineOptions(
            limits, times=TimeLimits(connect_seconds=10), data_out_listen=results
        )
        with pytest.raises(SessionError, match="stage 1"):
            async with open_pipeline(manifest, Deceived(), options, lambda line: None):
                raise AssertionError("the pipeline must not come up")


async def test_a_running_stage_shows_a_document_bound_to_the_very_handshake(deployment):
    key = load_identity(deployment.identity)
    async with deployment.running() as (manifest, _):
        evidence, binding = await fetch_evidence(manifest, 1, key)
        _, other = await fetch_evidence(manifest, 1, key)
    judge = partial(
        examine,
        evidence,
        root=deployment.authority.root_cert,
        now=datetime.now(UTC),
        expected=deployment.PCRS[1],
    )
    assert all(result.ok for result in judge(binding=binding))
    failed = {result.name for result in judge(binding=other) if not result.ok}
    assert failed == {"user_data", "nonce"}


def test_who_shows_nothing_himself_believes_pinned_measurements_alone(deployment):
    key = b"\1" * 32
    binding = Binding(b"door", b"\2" * 32, key, b"\3" * 32)
    verifier = attested_verifier(deployment.pinned, 0, deployment.authority.root_cert)
    assert verifier.verify(deployment.module(0).attest(binding), binding).measurements
    with pytest.raises(AttestationError, match="pcrs"):
        verifier.verify(deployment.module(1).attest(binding), binding)
    with pytest.raises(PolicyError, match="no expected_measurements"):
        attested_verifier(deployment.planned, 0)


def test_development_shows_which_version_it_is(tmp_path):
    def version(text):
        path = tmp_path / "transport" / "noise.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return software_measurement(tmp_path)[0]

    assert len({software_measurement()[0], version(""), version("a = 1"), version("a = 2")}) == 4
