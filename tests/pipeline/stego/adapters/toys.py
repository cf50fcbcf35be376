"""A model that fits a line, its tokenizer, and what the engines' tests hide."""

import numpy as np
import torch

from pipeline.sampling.params import SamplingParams
from pipeline.stego.adapters.conditional import Conditioning
from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.cover import CoverReader, CoverWriter
from pipeline.stego.keys import Secret
from pipeline.stego.message import seal
from pipeline.stego.range_coding import RangeCodec

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."
END = len(LETTERS)
VOCAB_SIZE = END + 1
SECRET = Secret(key=bytes(range(32)))
HOW = Conditioning(SamplingParams(temperature=1.0, top_k=20), excluded=(END,))
CONTEXT = b"toy"
PROMPT = (3, 1, 4, 1, 5)


def toy_logits(token_ids):
    """What follows the last three tokens: float32 [vocab]."""
    rng = np.random.default_rng([7, *map(int, token_ids[-3:])])
    return torch.tensor(rng.normal(scale=2.0, size=VOCAB_SIZE), dtype=torch.float32)


class ToyTokenizer:
    def encode(self, text, *, add_special_tokens=True):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, token_ids):
        return "".join(LETTERS[each] for each in token_ids)


class ToyEngine:
    """Generates greedily from what the callback has left of the logits."""

    fingerprint = "toy"
    end_token_id = END
    special_token_ids = (END,)

    def __init__(self):
        self.tokenizer = ToyTokenizer()
        self.num_runs = 0

    def logits(self, token_ids):
        return toy_logits(token_ids)

    def take(self, logits):
        return int(logits.argmax())

    def generate(self, prompt_ids, request, max_tokens):
        self.num_runs += 1
        token_ids = list(prompt_ids)
        for num_taken in range(max_tokens):
            logits = self.logits(token_ids)
            request.step(logits, num_taken, token_ids[-1] if num_taken else None)
            token_ids.append(self.take(logits))
            if token_ids[-1] == END:
                break
        return token_ids[len(prompt_ids) :]


def new_request(message=b"meet at nine"):
    codec = RangeCodec()
    writer = CoverWriter(seal(message, SECRET, CONTEXT), codec)
    return StegoRequest(writer, HOW, END)


def read(token_ids, prompt_ids=PROMPT):
    """The message of tokens, read step by step, outside of any adapter."""
    from pipeline.stego.adapters.conditional import conditional

    reader = CoverReader(SECRET, RangeCodec(), CONTEXT)
    text = list(prompt_ids)
    for token_id in token_ids:
        weights = conditional(toy_logits(text), HOW)
        reader.observe(weights, int(np.flatnonzero(weights.ids == token_id)[0]))
        text.append(token_id)
    assert reader.is_done
    return reader.message


def is_forced(logits):
    """Whether one token is left, of logit 0; its id."""
    left = torch.isfinite(logits).nonzero().flatten().tolist()
    assert len(left) == 1
    assert logits[left[0]] == 0
    return left[0]
