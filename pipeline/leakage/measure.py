"""From a model directory and a mode to a card."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.leakage.cards import Card, Cost, Integrity, Setting
from pipeline.leakage.modes import MODES, Mode
from pipeline.leakage.observations import Text, observe, read_texts
from pipeline.leakage.public_model import PublicModel
from pipeline.leakage.suite import ATTACKS, Attacker, Scope, recover, recover_all
from pipeline.leakage.utility import NUM_STAGES, measure_utility, tokens_per_second
from pipeline.models.config import load_config
from pipeline.progress import Progress

# What is being done, to something to tell how far it is.
Stages = Callable[[str], Progress | None]
PLAIN = MODES["plain"]


def measure(model_dir: Path, mode: Mode, scope: Scope, watch: Stages) -> Card:
    """Attack a mode on the package's texts. Raises InputError, mostly ModelError."""
    config = load_config(model_dir)
    layers = scope.layers_of(config.num_layers)
    if not all(0 <= layer < config.num_layers for layer in layers):
        raise InputError(f"--layers: this model has layers 0 to {config.num_layers - 1}")
    if scope.num_tokens >= config.max_positions:
        raise InputError(f"--tokens {scope.num_tokens}: the model takes {config.max_positions}")
    num_bytes = mode.bytes_per_token(config.hidden_dim, NUM_STAGES)
    tokenizer = Tokenizer(model_dir / "tokenizer.json")
    tokenizer.check_vocabulary(config.vocab_size)
    texts = read_texts(tokenizer, scope.num_texts, scope.num_tokens)
    model = PublicModel.load(model_dir, {*layers, config.num_layers // 2}, watch("loading"))
    speed, plain_speed = tokens_per_second(model, (mode, PLAIN), texts[0])
    attacker = Attacker(model, scope.num_tokens)
    recoveries = recover_all(
        attacker, mode, observe(model, mode, texts), layers, scope, watch("attacking")
    )
    return Card(
        mode=mode.name,
        version=mode.version,
        setting=mode.setting,
        model=model_dir.resolve().name,
        num_layers=config.num_layers,
        texts=scope.num_texts,
        recoveries=recoveries,
        utility=measure_utility(model, PLAIN, mode, texts, watch("comparing")),
        cost=Cost(
            tokens_per_second=speed,
            plain_tokens_per_second=plain_speed,
            bytes_per_token=num_bytes,
            round_trips_per_token=1,
        ),
        integrity=Integrity(lying_server=mode.lying_server, found_by=mode.found_by),
        settings=[_setting(attacker, model, mode, sigma, texts, scope) for sigma in mode.sigmas],
        protects=mode.protects,
    )


def _setting(
    attacker: Attacker, model: PublicModel, mode: Mode, sigma: float, texts: list[Text], scope: Scope
) -> Setting:
    """The strongest attack on noise of that strength, and its price."""
    other = replace(mode, make_view=mode.noise(sigma))
    seen = observe(model, other, texts)
    utility = measure_utility(model, PLAIN, other, texts, None)
    rates = [
        recover(attacker, each, seen, 0, scope.texts_at(0), None).token_recovery
        for each in ATTACKS
        if each.fits(other, 0)
    ]
    return Setting(
        sigma=sigma,
        token_recovery=max(rates),
        kl=utility.kl,
        greedy_agreement=utility.greedy_agreement,
    )
