"""What whoever starts the gateway decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ssl import SSLContext

from pipeline.errors import InputError
from pipeline.gateway.rate_limits import GatewayLimits
from pipeline.gateway.sampling_defaults import OPENAI
from pipeline.gateway.templates import ChatTemplate
from pipeline.gateway.tool_families import PLAIN, ToolFamily


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Where to listen, for whom, under which model name. Raises InputError.

    `tls`: the server's certificate; without it, what is said travels in the clear.
    `default_max_tokens`: of a continuation that names none; None: as many as the context holds.
    `samples_at_home`: no stage chooses a token.
    `tool_family`: how the model writes calls of tools. `sampling_defaults`: of what a client does
    not say. `cors_origins`: pages of these may read answers, in browsers; "*" for all.
    """

    served_model_name: str
    chat_template: ChatTemplate
    eos_token_ids: frozenset[int] = frozenset()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: frozenset[str] = frozenset()
    tls: SSLContext | None = None
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    default_max_tokens: int | None = None
    samples_at_home: bool = False
    tool_family: ToolFamily = PLAIN
    sampling_defaults: Mapping[str, float] = field(default_factory=lambda: OPENAI)
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what cannot be right."""
        if not self.served_model_name:
            raise InputError("the served model name is empty; give one")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"port {self.port} does not exist; give one below 65536")
        if "" in self.api_keys:
            raise InputError("an API key is empty; give at least one character")
