"""Write a GPT-2 of the given shape with random weights: as fast as the real one, nothing to fetch.

The same arguments give the same bytes. The tokenizer knows one word per token id ("t0", "t1", …),
which is what other engines' converters insist on.
"""

import json
from pathlib import Path

import numpy as np
from command_line import Parser, run_main, whole
from safetensors.numpy import save_file

GPT2_124M = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "vocab_size": 50257,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}
STANDARD_DEVIATION = 0.02  # as GPT-2 is initialised
# Larger than GPT-2's, so that layers outweigh the tied embedding and tokens do not just repeat.
INTO_RESIDUAL = 0.1
SEED = 20240


def weights(config: dict) -> dict[str, np.ndarray]:
    random = np.random.Generator(np.random.Philox(SEED))
    hidden, num_layers = config["n_embd"], config["n_layer"]

    def normal(*shape: int, scale: float = STANDARD_DEVIATION) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {
            f"{name}.weight": np.ones(hidden, np.float32),
            f"{name}.bias": np.zeros(hidden, np.float32),
        }

    found = {
        "wte.weight": normal(config["vocab_size"], hidden),
        "wpe.weight": normal(config["n_positions"], hidden),
    }
    for layer in range(num_layers):
        prefix = f"h.{layer}."
        for name, num_in, num_out, scale in (
            ("attn.c_attn", hidden, 3 * hidden, STANDARD_DEVIATION),
            ("attn.c_proj", hidden, hidden, INTO_RESIDUAL),
            ("mlp.c_fc", hidden, 4 * hidden, STANDARD_DEVIATION),
            ("mlp.c_proj", 4 * hidden, hidden, INTO_RESIDUAL),
        ):
            found[f"{prefix}{name}.weight"] = normal(num_in, num_out, scale=scale)
            found[f"{prefix}{name}.bias"] = normal(num_out)
        found |= norm(f"{prefix}ln_1") | norm(f"{prefix}ln_2")
    return found | norm("ln_f")


def tokenizer(vocab_size: int) -> dict:
    vocab = {f"t{token_id}": token_id for token_id in range(vocab_size - 1)}
    vocab["<|endoftext|>"] = vocab_size - 1
    special = {
        "id": vocab_size - 1, "content": "<|endoftext|>", "special": True, "single_word": False,
        "lstrip": False, "rstrip": False, "normalized": False,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<|endoftext|>"},
    }


def write(directory: Path, config: dict) -> None:
    """Write the model; `config.json` comes last, so that its presence means a whole model."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights(config), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(config["vocab_size"])))
    names = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk", "pad")}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = Parser(prog="random_model", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=whole(1), default=GPT2_124M["n_layer"])
    args = parser.parse_args()
    write(args.directory, {**GPT2_124M, "n_layer": args.layers})


if __name__ == "__main__":
    run_main("random_model", main)
