"""Texts drawn at random where a grammar alone says what may follow."""

import random

import numpy as np

from pipeline.gateway.grammars import Grammar, GrammarCompiler, GrammarKind

END = 256


def new_compiler(tokenizer):
    return GrammarCompiler(tokenizer, frozenset({END}))


async def compiled(tokenizer, kind, text, compiler=None):
    compiler = compiler or new_compiler(tokenizer)
    return await compiler.compile(Grammar(GrammarKind(kind), text, "field"), tokenizer.vocab_size)


def random_text(grammar, tokenizer, seed, most=400, end=END):
    """A text that the grammar takes as whole, and its tokens; None if it is not by so many.

    What closes something is drawn more often the longer the text is.
    """
    rng, mask, token_ids = random.Random(seed), grammar.new_mask(), []
    closing = {end, *tokenizer.encode('"}]')}
    while len(token_ids) < most:
        allowed = np.flatnonzero(mask.allowed(token_ids, tokenizer.vocab_size)).tolist()
        assert allowed
        ends = [each for each in allowed if each in closing]
        hurries = ends and rng.random() < len(token_ids) / most
        token_id = rng.choice(ends if hurries else allowed)
        if token_id == end:
            return tokenizer.decode(token_ids)
        token_ids.append(token_id)
    return None
