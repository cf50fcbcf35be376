"""The flags of serving."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.cli.kept_sessions import SecretFlag
from pipeline.cli.model_directory import ModelDir
from pipeline.cli.sampling_flags import SampleAtFlag
from pipeline.cli.settings import Count, Finite, Flag, Settings
from pipeline.cli.shared_options import MAX_CONTEXT_VARIABLE, Context, ManifestFlag, VerboseFlag
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.gateway.rate_limits import GatewayLimits

_DEFAULTS = GatewayLimits()


class ServeFlags(Settings):
    """What to serve where, and how many requests at once."""

    manifest: ManifestFlag
    model_dir: Annotated[
        ModelDir | None,
        Flag(
            "DIR|NAME",
            "Tokenizer and chat template; weights: --supervise [what `join` has laid out].",
        ),
    ] = None
    host: Annotated[str, Flag("HOST", "Where to listen; beyond loopback needs a key.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535), Flag("PORT", "HTTP port.")] = 8000
    api_key_file: Annotated[Path | None, Flag("FILE", "Accepted bearer keys, one a line.")] = None
    tls_cert: Annotated[Path | None, Flag("FILE", "Certificate chain (PEM), for HTTPS.")] = None
    tls_key: Annotated[Path | None, Flag("FILE", "Its key (PEM).")] = None
    served_model_name: Annotated[
        str | None,
        Flag(
            "NAME",
            "Name clients use [manifest's].",
            older=("INFEMERAL_CLIENT_MODEL_ID", "INFEMERAL_SERVER_MODEL_ID"),
        ),
    ] = None
    tool_parser: Annotated[
        str | None,
        Flag("NAME", "How the model writes calls of tools [its template's]."),
    ] = None
    sampling_defaults: Annotated[
        Literal["openai", "model"],
        Flag("WHOSE", "Of what clients do not say: OpenAI's, or generation_config.json's."),
    ] = "model"
    cors_origin: Annotated[
        tuple[str, ...],
        Flag("ORIGIN", "Pages of it may use this API; may be repeated.", is_by_hand=True),
    ] = ()
    replicas: Annotated[
        int, Field(ge=1, le=64), Flag("N", "Pipelines, each with workers of its own.")
    ] = 1
    max_batch: Annotated[
        int, Field(ge=1, le=1024), Flag("N", "Requests that a pipeline serves at once.")
    ] = 16
    chunk_tokens: Annotated[Count, Flag("N", "Prompt tokens in one step at most.")] = 128
    max_gap: Annotated[
        Finite,
        Field(ge=0.001),
        Flag("SECONDS", "Between two tokens while others' prompts are read, or 4 usual gaps."),
    ] = 0.25
    context: Annotated[
        Context | None,
        Flag("N", "Tokens of a request [the model's].", older=(MAX_CONTEXT_VARIABLE,)),
    ] = None
    prefix_share: Annotated[
        Finite,
        Field(ge=0, le=1),
        Flag("X", "Share of KV memory that texts of ended requests may take; 0: none."),
    ] = 0.75
    prefix_ttl: Annotated[
        Finite,
        Field(ge=0.1),
        Flag("SECONDS", "How long they stay, for requests that go on from them."),
    ] = 600.0
    sample_at: SampleAtFlag = "stage"
    secret_file: SecretFlag = None
    requests_per_minute: Annotated[
        Count | None, Flag("N", "Of all clients together [no limit].")
    ] = None
    max_connections: Annotated[Count, Flag("N", "Open connections at most.")] = (
        _DEFAULTS.max_connections
    )
    max_body_bytes: Annotated[Count, Flag("N", "Size of a request at most.")] = (
        _DEFAULTS.max_body_bytes
    )
    grace: Annotated[
        Finite, Field(ge=0), Flag("SECONDS", "For running requests after SIGTERM.")
    ] = 30.0
    no_page: Annotated[bool, Flag(None, "Show browsers no page at /.")] = False
    exit_on_loss: Annotated[bool, Flag(None, "End when a stage stays away.")] = False
    verbose: VerboseFlag = False

    @property
    def prefixes(self) -> PrefixOptions:
        """What may stay of requests that have ended."""
        return PrefixOptions(self.prefix_share, self.prefix_ttl)

    @property
    def limits(self) -> GatewayLimits:
        """What is refused before it is looked at."""
        return GatewayLimits(
            max_connections=self.max_connections,
            max_body_bytes=self.max_body_bytes,
            requests_per_minute=self.requests_per_minute,
        )
