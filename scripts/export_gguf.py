"""Write a model directory (GPT-2 or Llama family) as the GGUF file that llama.cpp reads.

The file has no vocabulary: it is for measuring, where prompts are token ids.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from command_line import Parser, run_main
from safetensors import safe_open

TYPES = {"f32": gguf.GGMLQuantizationType.F32, "q8_0": gguf.GGMLQuantizationType.Q8_0}
GPT2_NAMES = {
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down", "ln_1": "attn_norm", "ln_2": "ffn_norm",
}  # fmt: skip
GPT2_ENDS = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
LLAMA_ENDS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def read_tensors(model_dir: Path):
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name).float().numpy()


def rename(name: str, layer_prefix: str, layers: dict, ends: dict) -> str | None:
    """The GGUF name; None for buffers that are no weights."""
    stem, _, kind = name.rpartition(".")
    if stem in ends:
        return f"{ends[stem]}.{kind}"
    if not stem.startswith(layer_prefix):
        return None
    index, _, inner = stem.removeprefix(layer_prefix).partition(".")
    return f"blk.{index}.{layers[inner]}.{kind}" if inner in layers else None


def gpt2_tensors(model_dir: Path, config: dict):
    for name, array in read_tensors(model_dir):
        plain = name.removeprefix("transformer.")
        new = rename(plain, "h.", GPT2_NAMES, GPT2_ENDS)
        if new is not None:  # Conv1D stores [in, out]
            yield new, array.T if ".c_" in plain and array.ndim == 2 else array


def llama_tensors(model_dir: Path, config: dict):
    heads = config["num_attention_heads"]
    num_rows = {"attn_q": heads, "attn_k": config.get("num_key_value_heads", heads)}
    for name, array in read_tensors(model_dir):
        new = rename(name, "model.layers.", LLAMA_NAMES, LLAMA_ENDS)
        if new is None or (new.startswith("output.") and config.get("tie_word_embeddings")):
            continue
        count = next((n for part, n in num_rows.items() if part in new), None)
        yield new, array if count is None else interleave(array, count)


def interleave(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Each head's rows from (first half, second half), as transformers rotates them, to pairs."""
    by_half = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return by_half.swapaxes(1, 2).reshape(array.shape)


def describe_gpt2(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def describe_llama(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)


FAMILIES = {"gpt2": (describe_gpt2, gpt2_tensors), "llama": (describe_llama, llama_tensors)}


def export(model_dir: Path, target: Path, type_name: str) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    family = config["model_type"]
    if family not in FAMILIES:
        sys.exit(f"export_gguf: error: no GGUF for {family!r}, only for {', '.join(FAMILIES)}")
    describe, tensors = FAMILIES[family]
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, family)
    describe(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, array in tensors(model_dir, config):
        # What llama-quantize leaves alone stays as it is: vectors, and the table of positions.
        is_matrix = array.ndim == 2 and name != "position_embd.weight"
        kind = TYPES[type_name if is_matrix else "f32"]
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def main() -> None:
    parser = Parser(prog="export_gguf", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", choices=TYPES, default="f32")
    args = parser.parse_args()
    export(args.model_dir, args.target, args.type)


if __name__ == "__main__":
    run_main("export_gguf", main)
