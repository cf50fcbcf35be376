"""Text to token ids and back; the only place that sees a prompt's text."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from pipeline.errors import PromptError, TokenizerError

# What a byte-level decoder prints for a character whose bytes have not all arrived.
_REPLACEMENT = "\ufffd"
_MAX_HELD = 4
_CONTEXT = 8


class Tokenizer:
    """A `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises TokenizerError."""
        if not path.is_file():
            raise TokenizerError(
                f"no tokenizer at {path}; give the model directory's tokenizer.json"
            )
        try:
            self._tokenizer = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raise TokenizerError when this tokenizer can name tokens the model does not have."""
        if self.vocab_size > model_vocab_size:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens, the model {model_vocab_size}; "
                "give the tokenizer.json that belongs to the model"
            )

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens the tokenizer itself adds."""
        if not text:
            raise PromptError("the prompt is empty; give at least one token of text")
        try:
            # As a batch, since only that lets other threads run meanwhile.
            return tuple(self._tokenizer.encode_batch_fast([text])[0].ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise PromptError("the prompt is not valid Unicode text") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class TextStream:
    """Turns token ids into text as they come, holding back characters not yet complete.

    A token's text depends on its neighbours (a leading space, a character split over tokens),
    so what is emitted is the growth of the text of a short window, as the Hugging Face
    streamers do.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids` give the first generated token its left neighbour."""
        self._tokenizer = tokenizer
        self._num_held = 0
        self._restart(list(prompt_ids))

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._window.append(token_id)
        self._num_held += 1
        text = self._tokenizer.decode(self._window)
        # A character has at most four bytes, so what is not whole by then never will be.
        is_open = text.endswith(_REPLACEMENT) and self._num_held < _MAX_HELD
        return "" if is_open else self._emit(text)

    def finish(self) -> str:
        """What was held back: an incomplete character prints as U+FFFD."""
        return self._emit(self._tokenizer.decode(self._window))

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted) :]
        self._restart(self._window)
        return new

    def _restart(self, token_ids: list[int]) -> None:
        """Keep a few tokens of context, so that the cost of a token stays constant."""
        self._window = token_ids[-_CONTEXT:]
        self._emitted = self._tokenizer.decode(self._window)
        self._num_held = 0
