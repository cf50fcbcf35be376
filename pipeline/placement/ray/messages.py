"""What the orchestrator, the process that speaks with Ray, and keepers tell each other: JSON lines.

Down go a job and then orders, up come reports and troubles. Nothing here is a secret.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from pipeline.agreement.addresses import StageEndpoint, Strict, TcpAddress
from pipeline.errors import MessageError
from pipeline.placement.ray.strategy import Strategy

# A worker's last words are the longest text in a line.
MAX_LINE_BYTES = 1 << 16
MAX_TEXT = 4096

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
LossKind = Literal["hung", "silent", "mismatch"]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Job(Strict):
    """What is to run: the first line down."""

    # Of the cluster, as Ray takes it.
    address: str
    strategy: Strategy
    # What each stage takes of a node: Ray's names of resources, memory in bytes.
    needs: dict[str, Amount]
    # The manifest without addresses, as workers read it, and what else each stage's is told.
    core: str
    arguments: tuple[tuple[str, ...], ...]


class Start(Strict):
    """Have a stage kept from now on."""

    type: Literal["start"] = "start"
    stage_idx: int


class Lose(Strict):
    """A stage is lost to the orchestrator; its worker may have to make way."""

    type: Literal["lose"] = "lose"
    stage_idx: int
    kind: LossKind


class Kept(Strict):
    """What a keeper knows of its worker now."""

    # Where it runs, for people: the node's address, and processes on it.
    node: Text
    keeper_pid: int
    pid: int | None
    # Where the worker listens, once it does.
    control: TcpAddress | None = None
    data_in: TcpAddress | None = None
    # What it has computed and read.
    seconds: Amount = 0.0
    loaded: tuple[int, int] | None = None
    # Why it cannot be started, and whether none ever could be, there.
    problem: Text | None = None
    is_unusable: bool = False

    @property
    def addresses(self) -> StageEndpoint | None:
        """Where to dial the stage; whom it dials is for the orchestrator to say."""
        if self.control is None or self.data_in is None:
            return None
        return StageEndpoint(control=self.control, data_in=self.data_in)


class Report(Strict):
    """Of a stage: what its keeper says."""

    type: Literal["report"] = "report"
    stage_idx: int
    kept: Kept


class Away(Strict):
    """Of a stage: nobody keeps it now, and why."""

    type: Literal["away"] = "away"
    stage_idx: int
    reason: Text


class Cluster(Strict):
    """Whether the cluster answers, and why not; `is_unusable`: nor will it, as it is asked."""

    type: Literal["cluster"] = "cluster"
    reason: Text | None
    is_unusable: bool = False


Order = Start | Lose
News = Report | Away | Cluster
_LATER = ConfigDict(defer_build=True)
_ORDERS = TypeAdapter[Order](Annotated[Order, Field(discriminator="type")], config=_LATER)
_NEWS = TypeAdapter[News](Annotated[News, Field(discriminator="type")], config=_LATER)


def line_of(message: Strict) -> bytes:
    """A message as it is sent."""
    return message.model_dump_json().encode() + b"\n"


def parse_order(line: bytes) -> Order:
    """What the orchestrator has said. Raises pydantic's ValidationError for a line of others."""
    return _ORDERS.validate_json(line)


def parse_news_untrusted(line: bytes) -> News:
    """What the process that speaks with Ray has said. Raises MessageError."""
    if len(line) > MAX_LINE_BYTES:
        raise MessageError("what speaks with Ray has sent a line of no end")
    try:
        return _NEWS.validate_json(line)
    except ValidationError as error:
        raise MessageError("what speaks with Ray has sent a line that is none of its") from error


def cut(text: str) -> str:
    """An error's text, as long as a message may hold."""
    return " ".join(text.split())[:MAX_TEXT]
