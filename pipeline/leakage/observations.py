"""The texts, and what a mode's server observes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from pipeline.dtypes import Floats
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.leakage.evidence import Evidence, Pairs
from pipeline.leakage.modes import Mode
from pipeline.leakage.public_model import PublicModel, without_mean

# Sessions that an attacker sees of one text, where noise differs between them.
NUM_REPEATS = 16
SEED = 0  # cards can be measured again

Text = tuple[int, ...]


def read_texts(tokenizer: Tokenizer, num_texts: int, num_tokens: int) -> list[Text]:
    """The beginnings of the package's texts. Raises InputError for more than there are."""
    text = (files("pipeline.leakage.texts") / "english.txt").read_text(encoding="utf-8")
    passages = text.strip().split("\n\n")
    if num_texts > len(passages):
        raise InputError(f"--texts {num_texts}: there are {len(passages)}")
    encoded = [
        tokenizer.encode(passage, add_special_tokens=False)[:num_tokens]
        for passage in passages[:num_texts]
    ]
    shortest = min(map(len, encoded))
    if shortest < num_tokens:
        raise InputError(f"--tokens {num_tokens}: the shortest text has {shortest}")
    return encoded


@dataclass(frozen=True, slots=True)
class Observations:
    """Every text at every cut: public rows, and what the server holds of them."""

    texts: Sequence[Text]
    public: Sequence[dict[int, Floats]]  # what an attacker computes of a text: cut -> rows
    observed: Sequence[dict[int, Floats]]
    repeated: Sequence[Floats]  # at layer 0: [sessions, tokens, hidden]
    readers: Pairs

    def evidence(self, index: int, layer: int, num_known: int) -> Evidence:
        """What an attacker on a text has, with its first `num_known` tokens."""
        others = [each for each in range(len(self.texts)) if each != index] or [index]
        return Evidence(
            observed=self.observed[index][layer],
            known=self.public[index][layer][:num_known],
            readers=self.readers,
            other_sessions=Pairs(
                np.concatenate([self.public[each][layer] for each in others]),
                np.concatenate([self.observed[each][layer] for each in others]),
            ),
            repeated=self.repeated[index],
        )


def observe(
    model: PublicModel, server: PublicModel, mode: Mode, texts: Sequence[Text]
) -> Observations:
    """Run the texts through the server's model, and look at them as the mode's server does."""
    view = mode.make_view(model.config.hidden_dim, np.random.default_rng(SEED))

    def held(rows: Floats) -> Floats:
        return mode.on_the_wire(view.observe(rows))

    public = [_seen(model, model.rows_at_cuts(model.embed(text))) for text in texts]
    actual = public
    if mode.has_noise or server is not model:
        actual = [
            _seen(server, server.rows_at_cuts(view.disturb(server.embed(text)))) for text in texts
        ]
    return Observations(
        texts,
        public,
        [{cut: held(rows) for cut, rows in each.items()} for each in actual],
        [
            np.stack(
                [held(view.disturb(model.embed(text))) for _ in range(NUM_REPEATS)]
                if mode.has_noise
                else [held(rows[0])]
            )
            for text, rows in zip(texts, actual, strict=True)
        ],
        Pairs(model.readers, view.readers(server.readers)),
    )


def _seen(model: PublicModel, rows: dict[int, Floats]) -> dict[int, Floats]:
    """Rows as both sides compare them: without what the model's norms drop."""
    if not model.is_centred:
        return rows
    return {cut: without_mean(each) for cut, each in rows.items()}
