"""What both ends have to agree on beside the secret: model, how it is computed, settings.

All of it is bound into the message, so that a text read otherwise gives an error and nothing else.
Beside the secret lies a file that says it, for errors that name what differs.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.sampling.params import SamplingParams
from pipeline.stego.codecs import codec_name
from pipeline.stego.errors import StegoError

DEFAULT_CODEC = "range"
DEFAULT_TOP_K = 50
MAX_FILE_BYTES = 1 << 16

_HASHES = frozenset({"config", "tokenizer", "weights"})
_Text = Annotated[str, Field(max_length=256)]


class Settings(BaseModel):
    """How tokens are chosen. What means the same is the same, or it would be bound otherwise.

    Raises StegoError for a codec that there is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    codec: Annotated[str, AfterValidator(codec_name)] = DEFAULT_CODEC
    temperature: float = 1.0
    top_k: Annotated[int, AfterValidator(lambda top_k: max(top_k, 0))] = DEFAULT_TOP_K
    top_p: float = 1.0

    @property
    def sampling(self) -> SamplingParams:
        """The filters before the codec. Raises InputError: StegoError if they leave one token."""
        if 0 in {self.temperature, self.top_p} or self.top_k == 1:
            raise StegoError(
                "only the most likely token would be left to choose from, and no message fits "
                "into that; give a temperature and a top-p above 0, and a top-k of 0 or above 1"
            )
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Fingerprint(Settings):
    """Settings, and of the model what is known: hashes, and how the stages compute it.

    `wire`: how activations travel where that rounds them, and between which layers. `window`: what
    stages keep of a longer text. `weights` are
    not bound into messages: other weights give other texts anyway, and one model's may lie in
    other files.
    """

    config: _Text | None = None
    tokenizer: _Text | None = None
    weights: _Text | None = None
    precision: _Text | None = None
    kernels: _Text | None = None
    wire: _Text | None = None
    window: _Text | None = None

    def context(self, prompt_ids: Sequence[int]) -> bytes:
        """What a message after this prompt is bound to."""
        fields = self.model_dump(exclude={"weights"})
        if self.window is None:
            del fields["window"]  # as before there were any
        prompt = b"".join(token_id.to_bytes(4, "little") for token_id in prompt_ids)
        fields["prompt"] = hashlib.sha256(prompt).hexdigest()
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    def differences(self, recorded: "Fingerprint") -> str:
        """Where this is not what was recorded, as far as both say it; empty if nowhere."""
        mine, theirs = self.model_dump(), recorded.model_dump()
        return "; ".join(
            f"{name} is {_shown(name, mine[name])}, and was {_shown(name, theirs[name])}"
            for name in mine
            if None not in (mine[name], theirs[name]) and mine[name] != theirs[name]
        )

    def to_json(self) -> str:
        """For the file beside the secret."""
        return json.dumps(self.model_dump(exclude_none=True), indent=2) + "\n"


def parse_fingerprint(text: bytes, source: str) -> Fingerprint:
    """Read what `to_json` wrote. Raises StegoError naming the field."""
    try:
        return Fingerprint.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        what = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise StegoError(f"{source} is no fingerprint: {what}") from None


def _shown(name: str, value: object) -> str:
    return str(value)[:16] if name in _HASHES else str(value)
