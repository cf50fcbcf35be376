"""What all clients ask of the server."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

MODEL = "smollm2"
QUESTION = "Name an animal."
USER = [{"role": "user", "content": QUESTION}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


class Animal(BaseModel):
    """An animal; of all fields few values are allowed, since a small model fills them in."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["lion", "eagle", "spider"]
    legs: Literal[0, 2, 4, 6, 8]
    wild: bool
