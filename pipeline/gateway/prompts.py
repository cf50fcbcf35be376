"""Prompts as OpenAI's clients write them: text or token ids, one or several."""

from pydantic_core import PydanticCustomError

MAX_PROMPTS = 128

Prompts = tuple[str | tuple[int, ...], ...]


def list_prompts(value: object) -> object:
    """One prompt, or several, as they come in JSON."""
    prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not 0 < len(prompts) <= MAX_PROMPTS or not all(
        isinstance(prompt, str) or _is_ids(prompt) for prompt in prompts
    ):
        raise PydanticCustomError(
            "prompt_type",
            "Input should be a string, token ids, or a list of at most {num} of either",
            {"num": MAX_PROMPTS},
        )
    return tuple(tuple(prompt) if isinstance(prompt, list) else prompt for prompt in prompts)


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and 0 <= item < 1 << 31 for item in value)
    )
