"""A request whose arguments carry a sealed message: for an engine in another process.

The secret stays with whoever sealed it. The arguments hold the keys of this one message, which the
engine needs to choose the tokens.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import InputError
from pipeline.sampling.params import SamplingParams
from pipeline.stego.adapters.conditional import Conditioning
from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.codecs import parse_codec
from pipeline.stego.cover import CoverWriter
from pipeline.stego.errors import StegoError
from pipeline.stego.keys import MessageKeys
from pipeline.stego.message import HEADER_BYTES, MAX_MESSAGE_BYTES, TAG_BYTES, SealedMessage

# In `extra_args`, or `vllm_xargs` over HTTP: the fields below as JSON.
SEALED_ARG = "stego_sealed"

_KEY_PATTERN = "^[0-9a-f]{64}$"


class _Fields(BaseModel):
    """What travels; bytes as hexadecimal digits."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    header: str = Field(pattern=f"^[0-9a-f]{{{2 * HEADER_BYTES}}}$")
    body: str = Field(pattern="^([0-9a-f]{2})+$", max_length=2 * (MAX_MESSAGE_BYTES + TAG_BYTES))
    codec_key: str = Field(pattern=_KEY_PATTERN)
    tail_key: str = Field(pattern=_KEY_PATTERN)
    codec: str
    temperature: float = Field(gt=0)
    top_k: int
    top_p: float
    min_p: float
    excluded: tuple[int, ...]
    end_token_id: int = Field(ge=0)


def sealed_arguments(
    sealed: SealedMessage, codec: str, how: Conditioning, end_token_id: int
) -> dict[str, str]:
    """The arguments of a request that writes this message with the codec of this name."""
    fields = _Fields(
        header=sealed.header.hex(),
        body=sealed.body.hex(),
        codec_key=sealed.keys.codec.hex(),
        tail_key=sealed.keys.tail.hex(),
        codec=codec,
        temperature=how.params.temperature,
        top_k=how.params.top_k,
        top_p=how.params.top_p,
        min_p=how.params.min_p,
        excluded=how.excluded,
        end_token_id=end_token_id,
    )
    return {SEALED_ARG: fields.model_dump_json()}


class SealedRequests:
    """Requests by what their arguments carry; nothing is kept."""

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise StegoError for arguments that are ours and make no sense."""
        self.open(arguments)

    def open(self, arguments: Mapping[str, Any]) -> StegoRequest | None:
        """The request; none if it is not ours. Raises StegoError."""
        text = arguments.get(SEALED_ARG)
        return None if text is None else _request(_read(text))


def _read(text: object) -> _Fields:
    try:
        return _Fields.model_validate_json(text if isinstance(text, str) else json.dumps(text))
    except (TypeError, RecursionError) as error:
        raise StegoError(f"{SEALED_ARG}: no JSON") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StegoError(f"{SEALED_ARG}: {where or 'it'}: {first['msg']}") from None


def _request(fields: _Fields) -> StegoRequest:
    keys = MessageKeys(
        seal=b"",
        codec=bytes.fromhex(fields.codec_key),
        mask=b"",
        tail=bytes.fromhex(fields.tail_key),
    )
    sealed = SealedMessage(bytes.fromhex(fields.header), bytes.fromhex(fields.body), keys)
    try:
        params = SamplingParams(
            temperature=fields.temperature,
            top_k=fields.top_k,
            top_p=fields.top_p,
            min_p=fields.min_p,
        )
    except InputError as error:
        raise StegoError(f"{SEALED_ARG}: {error}") from error
    how = Conditioning(params, fields.excluded)
    return StegoRequest(CoverWriter(sealed, parse_codec(fields.codec)), how, fields.end_token_id)
