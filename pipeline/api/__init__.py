"""A pipeline driven by a program of one's own.

    from pathlib import Path

    import trio

    from pipeline.api import DevTrust, SamplingParams, Tokenizer, connect, load_manifest

    async def main():
        manifest = load_manifest(Path("manifests/smollm2_2stage.json"))
        tokenizer = Tokenizer(Path("models/smollm2/tokenizer.json"))
        trust = DevTrust.for_manifest(manifest, Path.home() / ".local/state/veilpipe/dev")
        async with connect(manifest, trust) as pipeline:
            prompt_ids = tokenizer.encode("The capital of France is")
            async for token in pipeline.generate(prompt_ids, max_tokens=20):
                print(tokenizer.decode([token.token_id]), end="", flush=True)

    trio.run(main)

In the place of `DevTrust`, `UserTrust.create(manifest, Path("identity.pem"))` demands of every
stage what the manifest says; `with_cids(manifest, {0: 16, 1: 17})` fills in what launching enclaves
has decided. Errors are of `pipeline.errors`: InputError for what cannot be asked for, SessionError
for stages that are missing, refused or lost. `connect(…, times=TimeLimits(request_seconds=60,
retry=RetryPolicy(attempts=3)))` says how long to wait for what.

`serve_stage` serves a stage with layers of one's own: LAYERS.md.
"""

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.agreement.templates import with_cids
from pipeline.agreement.trust_policy import DevTrust, Trust, UserTrust
from pipeline.api.connection import Connection, connect
from pipeline.api.serving import serve_stage
from pipeline.engine.generation import TokenOutput
from pipeline.engine.request import FinishReason
from pipeline.engine.tokenizer import Tokenizer
from pipeline.models.own_layers import Executor, SlotStates
from pipeline.protocol.batch import Segment
from pipeline.protocol.time_limits import RetryPolicy, TimeLimits
from pipeline.sampling.params import SamplingParams

__all__ = [
    "Connection",
    "DevTrust",
    "Executor",
    "FinishReason",
    "Manifest",
    "RetryPolicy",
    "SamplingParams",
    "Segment",
    "SlotStates",
    "TimeLimits",
    "TokenOutput",
    "Tokenizer",
    "Trust",
    "UserTrust",
    "connect",
    "load_manifest",
    "serve_stage",
    "with_cids",
]
