"""What whoever starts the gateway decides."""

from dataclasses import dataclass, field

from pipeline.errors import InputError
from pipeline.gateway.templates import ChatTemplate


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What one client may take from the others; durations in seconds.

    `header_seconds` bounds a request's headers and how long an idle connection is kept,
    `body_seconds` its body, `write_seconds` how long a client may read nothing of a response.
    Attacks: slow-loris, sockets left half closed, clients that never read.
    """

    max_connections: int = 1024
    max_body_bytes: int = 4 << 20
    max_choices: int = 128
    requests_per_minute: int | None = None
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    write_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Where to listen, for whom, under which model name. Raises InputError."""

    served_model_name: str
    chat_template: ChatTemplate
    eos_token_ids: frozenset[int] = frozenset()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: frozenset[str] = frozenset()
    limits: GatewayLimits = field(default_factory=GatewayLimits)

    def __post_init__(self) -> None:
        """Check what cannot be right."""
        if not self.served_model_name:
            raise InputError("the served model name is empty; give one")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"port {self.port} does not exist; give one below 65536")
        if "" in self.api_keys:
            raise InputError("an API key is empty; give at least one character")
