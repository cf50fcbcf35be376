"""GGUF files for tests, written by llama.cpp's own package from a model directory."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

Types = gguf.GGMLQuantizationType
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = NAMES | {
    "pre_feedforward_layernorm": "ffn_norm", "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
ARCHITECTURES = {"gemma3_text": "gemma3"}  # where the name is not that of checkpoints
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str, architecture: str) -> str:
    """What a tensor of a checkpoint is called there."""
    stem, _, kind = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    names = GEMMA_NAMES if architecture == "gemma3" else NAMES
    return f"blk.{layer}.{names[rest]}.{kind}"


def paired(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head by rotary pairs, as llama.cpp turns them."""
    halves = array.reshape(num_heads, 2, len(array) // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def pack(array: np.ndarray, kind: Types, seed: int) -> np.ndarray:
    """Rows in a type; those that the package does not write are random blocks of it."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(array), kind)
    except NotImplementedError:
        size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        return random_blocks(kind.name, len(array), array.shape[1] // size * num_bytes, seed)


def random_blocks(name: str, num_rows: int, row_bytes: int, seed: int) -> np.ndarray:
    """Rows of blocks with any bits in them, but scales as those of weights are."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
    starts = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    block = gguf.GGML_QUANT_SIZES[Types[name]][1]
    for start in starts.get(name, (0,)):
        scales = random.normal(0, 0.003, (num_rows, row_bytes // block)).astype("<f2")
        for byte in range(2):
            rows[:, start + byte :: block] = scales.view(np.uint8)[:, byte::2]
    return rows


def write_gguf(
    model_dir: Path,
    path: Path,
    kind_of: Callable[[str], Types],
    *,
    tokenizer: bool = False,
    change: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """Write a Llama-like model directory as one file; what its tensors mean, by checkpoint names.

    `kind_of` a tensor's name there; vectors stay in float32.
    """
    config = json.loads((model_dir / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer, config)
    if tokenizer:
        add_tokenizer(writer, model_dir)
    change(writer)
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    meaning = {}
    for seed, (name, tensor) in enumerate(load_file(model_dir / "model.safetensors").items()):
        new, array = gguf_name(name, architecture), tensor.float().numpy()
        if new.startswith("output.") and config["tie_word_embeddings"]:
            continue
        kind = kind_of(new) if array.ndim == 2 else Types.F32
        added = np.float32(1 if architecture == "gemma3" and array.ndim == 1 else 0)
        count = heads.get(new.split(".")[-2]) if architecture == "llama" else None
        rows = pack((array if count is None else paired(array, count)) + added, kind, seed)
        writer.add_tensor(new, rows, raw_dtype=kind)
        values = gguf.quants.dequantize(rows, kind) - added
        if count is not None:
            pairs = values.reshape(count, len(values) // count // 2, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        meaning[name] = np.ascontiguousarray(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def describe(writer: gguf.GGUFWriter, config: dict) -> None:
    """What config.json says."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path) -> None:
    """SmolLM2's."""
    fields = json.loads((model_dir / "tokenizer.json").read_text())
    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    vocab = fields["model"]["vocab"]
    special = {token["id"] for token in fields["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types([3 if index in special else 1 for index in range(len(vocab))])
    writer.add_token_merges([" ".join(merge) for merge in fields["model"]["merges"]])
    for key in ("pad", "unk"):
        getattr(writer, f"add_{key}_token_id")(vocab[settings[f"{key}_token"]])
    writer.add_chat_template(settings["chat_template"])
