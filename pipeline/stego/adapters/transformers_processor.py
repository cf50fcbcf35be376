"""What `generate` of transformers calls with logits, and its models as engines.

Models and tokenizers are handed in, so nothing of transformers is needed here.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.errors import StegoError

_Transformers: TypeAlias = Any  # what is handed in


class StegoLogitsProcessor:
    """Forces the tokens of a batch, whose rows are these requests in order; for one `generate`."""

    # There a row is whatever request has come to be computed, and none is told from another.
    supports_continuous_batching = False

    def __init__(self, requests: Sequence[StegoRequest]) -> None:
        self._requests = tuple(requests)
        self._num_prompt_tokens: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """New scores that leave each row one token.

        Shapes: input_ids [rows, prompt and tokens so far], scores [rows, vocab]. Raises StegoError
        if there are other rows than requests, such as beams.
        """
        if scores.shape[0] != len(self._requests):
            raise StegoError(
                f"generate has {scores.shape[0]} rows for {len(self._requests)} requests; switch "
                "off beam search, and ask for one sequence each"
            )
        if self._num_prompt_tokens is None:
            self._num_prompt_tokens = input_ids.shape[1]
        num_taken = input_ids.shape[1] - self._num_prompt_tokens
        last = input_ids[:, -1].tolist() if num_taken else [None] * len(self._requests)
        forced = scores.clone()
        for request, row, token_id in zip(self._requests, forced, last, strict=True):
            request.step(row, num_taken, token_id)
        return forced


class TransformersEngine:
    """A causal model of transformers and its tokenizer."""

    def __init__(self, model: _Transformers, tokenizer: _Transformers) -> None:
        """Raise StegoError where nothing says which token ends a text."""
        ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
        end = next((each for each in ends if each is not None), None)
        if end is None:
            raise StegoError("neither model nor tokenizer names the token that ends a text")
        end_token_ids = list(end) if isinstance(end, Sequence) else [int(end)]
        self.tokenizer = tokenizer
        self.fingerprint = f"transformers {model.config.model_type} {model.dtype}"
        self.end_token_id = end_token_ids[0]
        self.special_token_ids = (*end_token_ids, *tokenizer.all_special_ids)
        self._model = model

    def generate(
        self, prompt_ids: Sequence[int], request: StegoRequest, max_tokens: int
    ) -> Sequence[int]:
        """As `Engine.generate`."""
        input_ids = torch.tensor([list(prompt_ids)], device=self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                logits_processor=[StegoLogitsProcessor([request])],
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.end_token_id,
            )
        generated: list[int] = output[0, input_ids.shape[1] :].tolist()
        return generated
