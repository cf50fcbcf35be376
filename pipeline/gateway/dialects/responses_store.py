"""Responses that were given, for the conversations that go on from them."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.gateway.dialects.responses_items import FindItem
from pipeline.gateway.errors import ApiError, Kind, invalid

# Of one caller's: what a few hundred turns of a long conversation take.
_MAX_BYTES = 16 << 20
_MAX_RESPONSES = 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """A response, and the items of its conversation up to its end; both as JSON."""

    response: bytes
    items: bytes

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self.response) + len(self.items)


class ResponseStore:
    """In memory alone, the newest of each caller, who is one of the API keys or nobody.

    Attack: to read, go on from or delete what was said to another; to have another's forgotten by
    storing much. Hence each has a store of his own, and a bound of his own.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES, max_responses: int = _MAX_RESPONSES) -> None:
        self._max_bytes = max_bytes
        self._max_responses = max_responses
        self._callers: dict[bytes, OrderedDict[str, Stored]] = {}

    def put(
        self, caller: bytes, items: Sequence[Mapping[str, Any]], response: Mapping[str, Any]
    ) -> None:
        """Keep a response to these items, and forget the oldest beyond the bound."""
        conversation = [*items, *map(_without_logprobs, response["output"])]
        kept = self._callers.setdefault(caller, OrderedDict())
        kept[response["id"]] = Stored(_dumped(response), _dumped(conversation))
        num_bytes = sum(each.num_bytes for each in kept.values())
        while num_bytes > self._max_bytes or len(kept) > self._max_responses:
            num_bytes -= kept.popitem(last=False)[1].num_bytes

    def get(self, caller: bytes, response_id: str) -> Stored:
        """One of the caller's. Raises ApiError."""
        found = self._find(caller, response_id)
        if found is None:
            raise _not_found("Response", response_id)
        return found

    def conversation(self, caller: bytes, response_id: str | None) -> Sequence[Mapping[str, Any]]:
        """The items up to the end of one of the caller's; of none, none. Raises ApiError."""
        if response_id is None:
            return ()
        found = self._find(caller, response_id)
        if found is None:
            name = "previous_response_id"
            message = f"Previous response with id '{response_id[:100]}' not found."
            raise invalid(message, name, "previous_response_not_found")
        items: list[dict[str, Any]] = json.loads(found.items)
        return items

    def delete(self, caller: bytes, response_id: str) -> None:
        """Forget one. Raises ApiError if it is not the caller's, or there is none."""
        self.get(caller, response_id)
        del self._callers[caller][response_id]

    def finder(self, caller: bytes) -> FindItem:
        """Finds items of the caller's responses, for one request: each response is read once."""
        read: dict[str, Mapping[str, Any]] = {}

        def find(item_id: str) -> Mapping[str, Any]:
            response_id = response_id_of(item_id)
            if response_id not in read:
                output = json.loads(self.get(caller, response_id).response)["output"]
                read[response_id] = {item["id"]: item for item in output}
            item: Mapping[str, Any] | None = read[response_id].get(item_id)
            if item is None:
                raise _not_found("Item", item_id)
            return item

        return find

    def _find(self, caller: bytes, response_id: str) -> Stored | None:
        return self._callers.get(caller, OrderedDict()).get(response_id)


def response_id_of(item_id: str) -> str:
    """The id of the response whose item this is, if it is one of ours."""
    return f"resp_{item_id.partition('_')[2].partition('_')[0]}"


def _dumped(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _without_logprobs(item: Mapping[str, Any]) -> Mapping[str, Any]:
    if item["type"] != "message":
        return item
    content = [{**part, "logprobs": []} for part in item["content"]]
    return {**item, "content": content}


def _not_found(what: str, its_id: str) -> ApiError:
    message = f"{what} with id '{its_id[:100]}' not found; it is not stored here, or no longer."
    return ApiError(Kind.NOT_FOUND, message, code="not_found")
