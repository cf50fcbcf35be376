"""An engine whose model knows nothing: all tokens are drawn from noise, as requests say."""

from contextlib import aclosing, asynccontextmanager

import numpy as np
import trio

from pipeline.engine.generation import TokenOutput
from pipeline.engine.request import FinishReason
from pipeline.protocol.result_kinds import Result
from pipeline.sampling.draw import draw
from pipeline.sampling.filters import log_softmax


class RandomEngine:
    """Draws as a last stage does, `bias` more likely than the others."""

    max_seq_len = 4096

    def __init__(self, tokenizer, bias=""):
        self._vocab_size = tokenizer.vocab_size
        self._likely = list(tokenizer.encode(bias)) if bias else []
        self.generations = []

    @asynccontextmanager
    async def generate(self, generation):
        self.generations.append(generation)
        async with aclosing(self._outputs(generation)) as outputs:
            yield outputs

    async def _outputs(self, generation):
        sampler = generation.new_sampler()
        rng = np.random.default_rng(len(self.generations))
        for i in range(generation.max_tokens):
            await trio.lowlevel.checkpoint()
            logits = rng.normal(size=self._vocab_size).astype(np.float32)
            logits[self._likely] += 3
            assert generation.want.result is Result.DRAWN
            how = sampler.next_draw()
            if how.allowed and not any(how.allowed):
                raise sampler.no_choice()
            token_id = draw(logits, how)
            sampler.took(token_id)
            is_end = token_id in generation.eos_token_ids
            is_last = i + 1 == generation.max_tokens
            finish = FinishReason.LENGTH if is_last else None
            logprob = float(log_softmax(logits)[token_id])
            yield TokenOutput(token_id, logprob, (), FinishReason.EOS if is_end else finish)
            if is_end:
                return
