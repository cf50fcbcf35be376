"""A request on its way from prompt to last token."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from pipeline.engine.prompt_reader import PromptReader
from pipeline.engine.stored_text import StoredText
from pipeline.protocol.replay_history import SlotPart, truncate
from pipeline.protocol.result_kinds import Want
from pipeline.sampling.draw import Draw
from transport.frozen import frozen


class FinishReason(Enum):
    """Why a request ended."""

    EOS = "eos"
    LENGTH = "length"
    CONTEXT = "context"


@frozen
class Request:
    """What was asked: prompt token ids, how many tokens at most, which ids end it."""

    request_id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    # What its next token is made of, and how it, or one so many behind it, is drawn where the last
    # stage draws it.
    want: Want = Want.TOKEN
    next_draw: Callable[[int], Draw] | None = None
    # Where that depends on more than how many there are, as a mask may: how the token is drawn that
    # stands behind so many and a given one.
    draw_behind: Callable[[int, int], Draw] | None = None
    # Whose text it is: what it leaves in its slot is there for requests of the same salt, and no
    # other. None: for nobody.
    salt: bytes | None = None
    # The session that its text goes on from, and becomes.
    stored: StoredText | None = None
    # Who asks: where several do, each gets an equal share. None: one like all others of none.
    client: bytes | None = None
    # Who wants to know of the prompt's own rows.
    reader: PromptReader | None = None

    @property
    def num_read(self) -> int:
        """Tokens of the prompt that somebody wants to know of: they are computed in any case."""
        return 0 if self.reader is None else self.reader.num_rows

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt that are computed: where none follows it, those that are read."""
        return len(self.prompt_ids) if self.max_tokens else self.num_read


@dataclass(slots=True, eq=False)
class RequestState:
    """A request that owns a KV slot; the scheduler alone changes it."""

    request: Request
    # Its place among all that have come: who came last gives way first.
    arrival: int = 0
    # Set when the request is admitted.
    slot: int = -1
    # Tokens handed to the pipeline so far, whether or not their step has come back.
    num_sent: int = 0
    token_ids: list[int] = field(default_factory=list)
    # The steps they went in.
    pieces: list[SlotPart] = field(default_factory=list)
    # Tokens of the prompt that were in the slot before any of it was computed for this request.
    num_cached: int = 0
    # Whose first `num_led` tokens are to be copied once they have been sent: nothing goes before.
    leader: "RequestState | None" = None
    num_led: int = 0
    # Stored tokens that are being loaded into its slot: nothing goes before.
    num_loading: int = 0
    # The first so many tokens are read, many at a time; each of the others is a step of its own.
    num_prefill: int = field(init=False)

    def __post_init__(self) -> None:
        """Read the prompt."""
        self.num_prefill = self.request.num_prompt

    @property
    def may_send(self) -> bool:
        """Whether its slot holds all that it is to be given."""
        return self.leader is None and not self.num_loading

    @property
    def is_replayable(self) -> bool:
        """Whether all that its slot holds came there in steps: what was loaded did not."""
        return has_all_steps(self.pieces)

    @property
    def num_known(self) -> int:
        """Tokens that may be sent: the prompt, and each token that has come back."""
        return self.request.num_prompt + len(self.token_ids)

    @property
    def num_prompt_left(self) -> int:
        """Tokens to be read that have not been sent: of the prompt, and of what had to give way."""
        return max(0, self.num_prefill - self.num_sent)

    def pending(self, limit: int) -> tuple[int, ...]:
        """The next at most `limit` token ids to send.

        Those that somebody wants to know of, those that are read, and others are never mixed.
        """
        start, end = self.num_sent, self.num_sent + limit
        for bound in (self.request.num_read, self.num_prefill):
            if start < bound:
                end = min(end, bound)
        return self.known(start, end)

    def want(self, num_tokens: int) -> Want:
        """What the last stage is to return for so many next ones."""
        request, end = self.request, self.num_sent + num_tokens
        if request.reader is not None and self.num_sent < request.num_read:
            return request.reader.want(self.num_sent, end)
        return request.want if end == self.num_known else Want.NOTHING

    def known(self, start: int, end: int) -> tuple[int, ...]:
        """The token ids at positions `start` to `end`, as far as they are known."""
        prompt = self.request.prompt_ids
        if end <= len(prompt):
            return prompt[start:end]
        generated = self.token_ids[max(0, start - len(prompt)) : end - len(prompt)]
        return (*prompt[start:], *generated)

    def add(self, token_id: int, max_seq_len: int) -> FinishReason | None:
        """Take a generated token; why the request ends with it, if it does."""
        self.token_ids.append(token_id)
        if token_id in self.request.eos_token_ids:
            return FinishReason.EOS
        if len(self.token_ids) >= self.request.max_tokens:
            return FinishReason.LENGTH
        return FinishReason.CONTEXT if self.num_known > max_seq_len else None

    def sent(self, piece: SlotPart) -> None:
        """Count a step's part as handed to the pipeline."""
        self.num_sent += piece.num_tokens
        self.pieces.append(piece)

    def hold(self, pieces: Collection[SlotPart], length: int) -> None:
        """Begin with `length` tokens, which the slot holds; these are the steps they went in."""
        self.pieces = list(pieces)
        truncate(self.pieces, length)
        self.num_sent = length
        if not self.token_ids:  # else it has given way, and this is no gain
            self.num_cached = length

    def give_way(self, *, is_row_exact: bool) -> None:
        """Hold nothing; what is known is sent again.

        All at once only where a row comes out the same, bit for bit, whatever steps it came in.
        """
        self.num_sent, self.slot, self.leader = 0, -1, None
        self.pieces.clear()
        if is_row_exact:
            self.num_prefill = self.num_known

    def unsend_since(self, step: int) -> bool:
        """Take back all that travelled in that step or a later one; whether there is any."""
        lost = [piece for piece in self.pieces if piece.step >= step]
        if lost:
            self.unsend(self.num_sent - lost[0].position)
        self.num_cached = min(self.num_cached, self.num_sent)
        return bool(lost)

    def unsend(self, num_tokens: int) -> None:
        """Take back the last so many: their step is lost, or is to be forgotten by the stages."""
        self.num_sent -= num_tokens
        truncate(self.pieces, self.num_sent)


def has_all_steps(pieces: Sequence[SlotPart]) -> bool:
    """Whether these are all steps of what a slot holds, from its first token on."""
    return bool(pieces) and pieces[0].position == 0


@frozen
class TokenEvent:
    """One generated token; `finish` is set on a request's last.

    NO_TOKEN where a request ends that wanted no more than to read its prompt.
    """

    request_id: int
    token_id: int
    step: int
    finish: FinishReason | None
    # Of its request's prompt.
    num_cached: int = 0
