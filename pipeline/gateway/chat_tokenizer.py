"""What the gateway needs of a tokenizer beyond the pipeline's: rendered chats, and a bound."""

from functools import cached_property

from pipeline.engine.tokenizer import Tokenizer


class GatewayTokenizer(Tokenizer):
    """A `tokenizer.json` for serving."""

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered chat, which holds its special tokens already.

        Raises PromptError.
        """
        return self.encode(text, add_special_tokens=False)

    @property
    def num_ids(self) -> int:
        """One more than the largest token id it has, whatever the model has."""
        return self._num_ids

    def added_token(self, text: str) -> int | None:
        """The id of the token that was added to mark something, if this is one."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._added else None

    def spelled(self) -> str:
        """All of it, as `tokenizer.json` has it."""
        return self._tokenizer.to_str()

    def spellings(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The tokens of a word inside a text: as it begins one, and behind a blank.

        As vLLM has it: the second only where the blank is part of its first token. Raises
        PromptError.
        """
        plain = self.encode(word, add_special_tokens=False)
        behind = self.encode(" " + word.lstrip(), add_special_tokens=False)
        if behind[:1] == plain[:1] or len(behind) != len(plain):
            return (plain,)
        return plain, behind

    @cached_property
    def max_token_chars(self) -> int:
        """No token stands for more characters of a text than this."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
