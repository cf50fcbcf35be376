"""From a model directory and a mode to a card."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.leakage.attacker import Attacker
from pipeline.leakage.cards import DELTA, Card, Cost, Integrity, Setting
from pipeline.leakage.encoded_cost import measure_encoded
from pipeline.leakage.encoded_suite import EncodedTexts, recover_encoded
from pipeline.leakage.linear_models import LinearHost, opened_linear_model
from pipeline.leakage.modes import MODES, Mode
from pipeline.leakage.observations import SEED, Text, observe, read_texts
from pipeline.leakage.public_model import PublicModel
from pipeline.leakage.rotated_model import load_rotated
from pipeline.leakage.suite import ATTACKS, Scope, recover, recover_all
from pipeline.leakage.uniformity import held_against_uniform
from pipeline.leakage.utility import (
    NUM_STAGES,
    TIMED_TOKENS,
    ModePipeline,
    measure_utility,
    tokens_per_second,
)
from pipeline.models.config import load_config
from pipeline.progress import Watch

# Other strengths of noise are tried on so many.
SWEPT_TEXTS = 5
PLAIN = MODES["plain"]


@dataclass(frozen=True, slots=True)
class Laboratory:
    """A model and texts, ready for modes to be tried on."""

    model_dir: Path
    model: PublicModel
    texts: Sequence[Text]
    attacker: Attacker
    scope: Scope
    layers: tuple[int, ...]

    @classmethod
    def open(cls, model_dir: Path, scope: Scope, watch: Watch) -> "Laboratory":
        """Load the model. Raises InputError, mostly ModelError or TokenizerError."""
        config = load_config(model_dir)
        layers = scope.layers_of(config.num_layers)
        if not all(0 <= layer < config.num_layers for layer in layers):
            raise InputError(f"--layers: this model has the layers 0 to {config.num_layers - 1}")
        if 2 * scope.num_tokens > config.max_positions:
            raise InputError(
                f"--tokens {scope.num_tokens}: more than half of the model's {config.max_positions}"
            )
        tokenizer = Tokenizer(model_dir / "tokenizer.json")
        tokenizer.check_vocabulary(config.vocab_size)
        texts = read_texts(tokenizer, scope.num_texts, scope.num_tokens)
        cuts = {*layers, config.num_layers // NUM_STAGES}
        model = PublicModel.load(model_dir, sorted(cuts), watch("loading weights", "bytes"))
        attacker = Attacker(model, scope.num_tokens)
        return cls(model_dir, model, texts, attacker, scope, layers)

    def card(self, mode: Mode, watch: Watch) -> Card:
        """Attack a mode, and measure what it costs. Raises InputError."""
        match mode.holds:
            case "rows":
                num_bytes = mode.bytes_per_token(self.model.config.hidden_dim, NUM_STAGES)
                return self._card(mode, self._server(mode), num_bytes, watch)
            case "masked words" | "mixed rows":
                return self._card_of_linears(mode, watch)
            case _:
                return self._card_of_encoded_rows(mode, watch)

    def _card_of_linears(self, mode: Mode, watch: Watch) -> Card:
        host = LinearHost.load(self.model_dir)
        # All texts once; one of them for time, with tokens behind it, and one for its words.
        num_rows = (self.scope.num_texts + 2) * self.scope.num_tokens + TIMED_TOKENS
        with opened_linear_model(
            mode, self.model_dir, self.model.cuts[1:-1], host, num_rows
        ) as server:
            if mode.holds == "mixed rows":  # tokens behind a prompt come alone, and stay
                return self._card(mode, server, 0, watch)
            host.seen = []
            server.rows_at_cuts(server.embed(self.texts[0]))
            sent = np.concatenate([each.reshape(-1) for each in host.seen])
            host.seen = None
            mode = replace(mode, round_trips_per_token=len(host.linears))
            card = self._card(mode, server, host.bytes_a_row, watch)
            return card.model_copy(update={"uniformity": held_against_uniform(sent)})

    def _card(self, mode: Mode, server: PublicModel, num_bytes: int, watch: Watch) -> Card:
        model, texts, scope = self.model, self.texts, self.scope
        pipelines = ModePipeline(server, mode), ModePipeline(model, PLAIN)
        speed, plain_speed = tokens_per_second(pipelines, texts[0])
        seen = observe(model, server if mode.holds == "rows" else model, mode, texts)
        recoveries = recover_all(
            self.attacker, mode, seen, self.layers, scope, watch(f"attacking {mode.name}", "texts")
        )
        utility = measure_utility(
            pipelines[1], pipelines[0], texts, watch("comparing predictions", "texts")
        )
        return Card(
            mode=mode.name,
            version=mode.version,
            setting=mode.setting,
            model=self.model_dir.resolve().name,
            num_layers=model.config.num_layers,
            texts=scope.num_texts,
            recoveries=recoveries,
            utility=utility,
            cost=Cost(
                tokens_per_second=speed,
                plain_tokens_per_second=plain_speed,
                bytes_per_token=num_bytes,
                round_trips_per_token=mode.round_trips_per_token,
            ),
            integrity=Integrity(lying_server=mode.lying_server, found_by=mode.found_by),
            epsilon=mode.epsilon(scope.num_tokens, DELTA),
            settings=[self._setting(mode, sigma) for sigma in mode.sigmas],
            protects=mode.protects,
        )

    def _card_of_encoded_rows(self, mode: Mode, watch: Watch) -> Card:
        recoveries = recover_encoded(
            EncodedTexts(self.model_dir, self.model, self.attacker, self.texts, self.scope),
            mode,
            self.layers,
            watch(f"attacking {mode.name}", "attacks"),
        )
        utility, cost = measure_encoded(
            self.model_dir, self.model, mode, self.texts, watch("comparing predictions", "texts")
        )
        return Card(
            mode=mode.name,
            version=mode.version,
            setting=mode.setting,
            model=self.model_dir.resolve().name,
            num_layers=self.model.config.num_layers,
            texts=self.scope.num_texts,
            recoveries=recoveries,
            utility=utility,
            cost=cost,
            integrity=Integrity(lying_server=mode.lying_server, found_by=mode.found_by),
            epsilon=None,
            settings=[],
            protects=mode.protects,
        )

    def _server(self, mode: Mode) -> PublicModel:
        """The model as the mode's server has it."""
        if mode.disguise != "rotation":
            return self.model
        return load_rotated(self.model_dir, self.model.cuts[1:-1], np.random.default_rng(SEED))

    def _setting(self, mode: Mode, sigma: float) -> Setting:
        """The strongest attack on noise of that strength, and its price."""
        other = mode.with_sigma(sigma)
        texts = self.texts[:SWEPT_TEXTS]
        scope = replace(self.scope, num_texts=len(texts))
        seen = observe(self.model, self.model, other, texts)
        plain = ModePipeline(self.model, PLAIN)
        utility = measure_utility(plain, ModePipeline(self.model, other), texts, None)
        recoveries = [
            recover(self.attacker, each, seen, 0, scope, None)
            for each in ATTACKS
            if each.fits(other, 0)
        ]
        best = max(recoveries, key=lambda each: each.token_recovery)
        return Setting(
            sigma=sigma,
            epsilon=other.epsilon(scope.num_tokens, DELTA) or 0.0,
            attack=best.attack,
            token_recovery=best.token_recovery,
            kl=utility.kl,
            greedy_agreement=utility.greedy_agreement,
        )
