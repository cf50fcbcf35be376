"""What the gateway needs of a tokenizer beyond the pipeline's: rendered chats, and a bound."""

from collections.abc import Sequence
from functools import cached_property

from pipeline.engine.output_text import StoppedText
from pipeline.engine.text_stream import REPLACEMENT
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

    def token_name(self, token_id: int) -> str | None:
        """What its vocabulary calls a token; None for what is none."""
        return self._tokenizer.id_to_token(token_id)

    def decode_whole(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        if REPLACEMENT not in text:
            return text
        stream = StoppedText(self, (), (), shows_special_tokens=True)  # see `decode`
        return "".join(stream.push(each)[0] for each in token_ids) + stream.finish()[0]

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
