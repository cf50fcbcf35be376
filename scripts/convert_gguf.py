"""Turn a Llama GGUF with a GPT-2-style tokenizer into an ordinary Hugging Face model directory.

    python scripts/convert_gguf.py MODEL.gguf DIRECTORY

Weights are written as float16. A Q4_1 weight is scale * 0..15 + minimum, at most 15 steps from zero
or so, and float16 rounds it to within 1/128 of a step (Q8_0: 1/16 of a step), far below what the
quantisation itself has lost; float32 would double the download's size on disk for nothing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

CONTROL_TOKEN = 3  # GGUF's token type for special tokens
SUPPORTED_PRE_TOKENIZER = "smollm"  # single digits, then GPT-2's split
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


class Metadata:
    """The key-value part of a GGUF; a missing key ends the program with its name."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            sys.exit(f"convert_gguf: error: the GGUF has no {key}: it is not a supported model")
        return self._fields[key].contents()


def hf_name(name: str) -> str:
    """The checkpoint's name of a GGUF tensor."""
    stem = name.removesuffix(".weight")
    if stem in MODEL_TENSORS:
        return f"{MODEL_TENSORS[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight"


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order, which puts a rotary pair side by side, not half a head apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def convert_weights(reader: GGUFReader, meta: Metadata) -> dict[str, np.ndarray]:
    """Every tensor under its checkpoint name, float16."""
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    weights = {}
    for number, tensor in enumerate(reader.tensors, start=1):
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        weights[hf_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float16)
        if sys.stderr.isatty() and (number % 8 == 0 or number == len(reader.tensors)):
            print(f"\rconverting {number}/{len(reader.tensors)}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return weights


def model_config(meta: Metadata, is_tied: bool) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        # stored as float32 in a GGUF; the shortest decimal that means the same
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": float(str(np.float32(meta["llama.rope.freq_base"]))),
        "tie_word_embeddings": is_tied,
        "torch_dtype": "float16",
        "vocab_size": meta["llama.vocab_size"],
    }


def _special_tokens(meta: Metadata) -> dict[int, str]:
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    return {index: tokens[index] for index, kind in enumerate(types) if kind == CONTROL_TOKEN}


def _added_token(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def tokenizer(meta: Metadata) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE whose numbers are split into digits first."""
    kind = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]
    if kind != ("gpt2", SUPPORTED_PRE_TOKENIZER):
        sys.exit(f"convert_gguf: error: tokenizer {'/'.join(kind)} is not supported")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, **_added_token(token)} for index, token in _special_tokens(meta).items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(meta: Metadata) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    special = _special_tokens(meta)
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): _added_token(token) for index, token in special.items()
        },
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def convert(source: Path, directory: Path) -> None:
    """Write the model directory; `directory` exists and is empty."""
    try:
        reader = GGUFReader(source)
    except ValueError as error:
        sys.exit(f"convert_gguf: error: {source} is no GGUF file: {error}")
    meta = Metadata(reader)
    if meta["general.architecture"] != "llama":
        sys.exit(f"convert_gguf: error: architecture {meta['general.architecture']} is not llama")
    weights = convert_weights(reader, meta)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(
        0o644
    )  # the library leaves it readable to its owner only
    _write_json(directory / "config.json", model_config(meta, "lm_head.weight" not in weights))
    _write_json(directory / "tokenizer.json", tokenizer(meta))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(meta))
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
            "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
            "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        },
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("directory", type=Path, help="where to write; made if absent")
    arguments = parser.parse_args()
    if not arguments.source.is_file():
        sys.exit(f"convert_gguf: error: no file {arguments.source}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    convert(arguments.source, arguments.directory)


if __name__ == "__main__":
    main()
