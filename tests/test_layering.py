"""A module imports only from lower layers: the architecture is what this list says."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transport", "pipeline", "enclave")

# Lowest first. A module may import from lines above its own, and from its own line never.
LAYERS = [
    # transport
    "transport.errors",
    "transport.tallies",
    "transport.address transport.wire transport.lobby transport.private_files transport.link",
    "transport.endpoint_errors",
    "transport.endpoint",
    "transport.attestation.evidence",
    "transport.attestation.cbor transport.attestation.key_only",
    "transport.attestation.cose",
    "transport.attestation.chain",
    "transport.attestation.document",
    "transport.attestation.nsm",
    "transport.attestation.nitro",
    "transport.attestation.dev",
    "transport.cipher",
    "transport.noise",
    "transport.records",
    "transport.handshake transport.frames",
    "transport.framing",
    "transport.greeting transport.single_records",
    "transport.channel",
    "transport.relay",
    "transport.relay_manifest",
    "transport.relay_cli",
    # pipeline
    "pipeline.errors pipeline.tasks",
    "pipeline.models.runtime",
    "pipeline.files pipeline.rotation pipeline.dtypes pipeline.models.batch",
    "pipeline.sampling.params pipeline.sampling.processors pipeline.sampling.stop",
    "pipeline.sampling.sampler",
    "pipeline.manifest pipeline.messages",
    "pipeline.replay",
    "pipeline.models.config pipeline.models.kv_cache pipeline.models.quant pipeline.models.arena",
    "pipeline.models.sinks",
    "pipeline.models.weights pipeline.models.kernels",
    "pipeline.models.rope pipeline.models.embedding pipeline.models.torch_attention",
    "pipeline.models.native_step",
    "pipeline.models.kernels_torch pipeline.models.kernels_native pipeline.models.outline",
    "pipeline.models.self_test",
    "pipeline.models.kernels_cuda",
    "pipeline.models.kernel_choice",
    "pipeline.models.base",
    "pipeline.models.gpt2 pipeline.models.llama",
    "pipeline.models.registry",
    "pipeline.engine.request pipeline.engine.tokenizer pipeline.engine.latency",
    "pipeline.engine.generation",
    "pipeline.engine.scheduler",
    "pipeline.steps pipeline.tensors pipeline.trust pipeline.plan",
    "pipeline.codec pipeline.activation_log pipeline.catch_up pipeline.shard",
    "pipeline.stage",
    "pipeline.links pipeline.drive pipeline.meter",
    "pipeline.local pipeline.service",
    "pipeline.peers",
    "pipeline.stage_setup",
    "pipeline.neighbours",
    "pipeline.lane",
    "pipeline.session pipeline.remote_stage pipeline.ahead",
    "pipeline.worker pipeline.connector pipeline.evidence",
    "pipeline.remote_pipeline",
    "pipeline.orchestrator",
    "pipeline.failover pipeline.supervisor",
    "pipeline.gateway.templates pipeline.gateway.text pipeline.gateway.errors",
    "pipeline.gateway.metrics",
    "pipeline.gateway.overview",
    "pipeline.gateway.auth pipeline.gateway.limits",
    "pipeline.gateway.config",
    "pipeline.gateway.schemas pipeline.gateway.choices",
    "pipeline.gateway.formats pipeline.gateway.edge",
    "pipeline.gateway.answers pipeline.gateway.connection",
    "pipeline.gateway.app",
    "pipeline.gateway.server",
    "pipeline.cli.logs",
    "pipeline.cli.common",
    "pipeline.cli.attest pipeline.cli.connection",
    "pipeline.cli.generate pipeline.cli.serve pipeline.cli.top",
    "pipeline.cli.stage_worker pipeline.cli.orchestrator",
    "pipeline.cli.standby",
    "pipeline.cli.entry",
]
RANK = {module: rank for rank, line in enumerate(LAYERS) for module in line.split()}
FORBIDDEN = {
    "transport": {"torch", "numpy", "pipeline", "enclave", "transformers"},
    "enclave": {"torch", "numpy", "pipeline", "transport", "transformers"},
    "pipeline": {"enclave", "transformers"},
}


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__init__":
                yield ".".join(parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value))
def test_a_module_imports_only_from_lower_layers(module, path):
    package = module.partition(".")[0]
    found = set(imports(path))
    crossing = {name for name in found if name.partition(".")[0] in FORBIDDEN[package]}
    assert not crossing, f"{module} must not import {crossing}"
    if package == "enclave":
        return
    assert module in RANK, f"{module} has no layer yet: add it to LAYERS"
    for name in found & RANK.keys():
        assert RANK[name] < RANK[module], f"{module} imports {name}, which is not below it"


def test_no_layer_names_a_module_that_is_gone():
    existing = {module for module, _ in modules()}
    assert existing >= RANK.keys(), RANK.keys() - existing


def test_no_runtime_module_needs_a_test_dependency():
    standard = sys.stdlib_module_names
    allowed = {
        "cryptography", "msgpack", "numpy", "pydantic", "rich", "safetensors",
        "tokenizers", "torch", "trio", "typer", *PACKAGES,
        # the gateway
        "hypercorn", "jinja2", "prometheus_client", "pydantic_core", "starlette",
    }  # fmt: skip
    for module, path in modules():
        roots = {name.partition(".")[0] for name in imports(path)}
        assert roots <= allowed | standard, f"{module} imports {roots - allowed - standard}"
