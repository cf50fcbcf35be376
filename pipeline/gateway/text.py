"""What the gateway needs of a tokenizer beyond the pipeline's: encoding a rendered chat."""

from pipeline.engine.tokenizer import Tokenizer


class GatewayTokenizer(Tokenizer):
    """A `tokenizer.json` for serving."""

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered chat, which holds its special tokens already.

        Raises PromptError.
        """
        return self.encode(text, add_special_tokens=False)
