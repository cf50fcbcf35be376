"""What tells of prompts rather than goes on with them: /tokenize, /detokenize, /v1/embeddings."""

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.engine.prompt_reader import PromptMeaning
from pipeline.gateway.desk import Desk, Job
from pipeline.gateway.errors import invalid
from pipeline.gateway.evaluation_requests import (
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from pipeline.gateway.http.answer_schemas import Embeddings, Text, TokenizerInfo, Tokens
from pipeline.gateway.http.api_route import ApiRoute
from pipeline.gateway.http.client_exchange import Exchange
from pipeline.gateway.openai_requests import parse_untrusted


def evaluation_routes(desk: Desk) -> Sequence[Route]:
    """All of them."""
    door, post = EvaluationDoor(desk), ["POST"]
    return (
        ApiRoute(
            "/tokenize", door.tokenize, methods=post, body=TokenizeRequest, answer=Tokens
        ),
        ApiRoute("/detokenize", door.detokenize, methods=post, body=DetokenizeRequest, answer=Text),
        ApiRoute("/tokenizer_info", door.tokenizer_info, answer=TokenizerInfo),
        ApiRoute(
            "/v1/embeddings", door.embeddings, methods=post, body=EmbeddingRequest,
            answer=Embeddings,
        ),
    )  # fmt: skip


class EvaluationDoor:
    """What each route does."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text, or of a conversation as the model sees it."""
        exchange: Exchange = request.state.exchange
        body = await exchange.understand(partial(parse_untrusted, TokenizeRequest))
        token_ids = await self._desk.encode(body.order(), exchange.record)
        strings = None
        if body.return_token_strs:
            strings = [self._desk.tokenizer.token_name(each) for each in token_ids]
        return JSONResponse(
            {
                "count": len(token_ids),
                "max_model_len": self._desk.max_seq_len,
                "tokens": token_ids,
                "token_strs": strings,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens, special ones included."""
        exchange: Exchange = request.state.exchange
        body = await exchange.understand(partial(parse_untrusted, DetokenizeRequest))
        text = await self._desk.decode(body.model, body.tokens, exchange.record)
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, _: Request) -> Response:
        """What a client needs to render conversations: the special tokens, the chat template."""
        template = self._desk.config.chat_template
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": self._desk.max_seq_len,
                **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
                "eos_token": self._end_token(),
                **template.special_tokens,
                "chat_template": template.source,
            }
        )

    def _end_token(self) -> str | None:
        """The name of what ends a text, where the model's files give its number alone."""
        ends = sorted(self._desk.config.eos_token_ids)
        return self._desk.tokenizer.token_name(ends[0]) if ends else None

    async def embeddings(self, request: Request) -> Response:
        """What texts mean: a vector of length 1 each, of the last layer's rows."""
        exchange: Exchange = request.state.exchange
        body = await exchange.understand(partial(parse_untrusted, EmbeddingRequest))
        job = await self._desk.prepare(body.order(), exchange.record, exchange.caller)
        exchange.forget_body()
        async with self._desk.generate(job) as pieces:
            async for _ in pieces:
                pass
        vectors = [_vector(job, index, body) for index in range(len(job.prompts))]
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": vector}
                    for index, vector in enumerate(vectors)
                ],
                "model": self._desk.config.served_model_name,
                "usage": {"prompt_tokens": job.num_prompt, "total_tokens": job.num_prompt},
            }
        )


def _vector(job: Job, index: int, body: EmbeddingRequest) -> Any:  # noqa: ANN401  (JSON)
    reader = job.generations[index].reader
    assert isinstance(reader, PromptMeaning)  # which its order makes
    vector = reader.vector(body.dimensions)
    if body.dimensions is not None and vector.size < body.dimensions:
        raise invalid(f"dimensions: this model's vectors have {vector.size}.", "dimensions")
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
