"""GGUF files for tests, written by llama.cpp's own package from a model directory.

Names of tensors are those of the package's own tables; what its converter does to tensors of a
family, beside renaming them, is written here once more.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

Types = gguf.GGMLQuantizationType
# model_type -> the architecture, where it has another name there.
ARCHITECTURES = {
    "gemma3_text": "gemma3", "mistral": "llama", "mixtral": "llama", "olmo3": "olmo2",
    "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss",
}  # fmt: skip
Mapped = dict[str, np.ndarray]


def names_of(architecture: str, num_layers: int) -> Callable[[str], str]:
    """What tensors of a checkpoint are called there, by the package."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, num_layers)

    def named(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    return named


def paired(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head by rotary pairs, as llama.cpp turns them."""
    halves = array.reshape(num_heads, 2, len(array) // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def unpaired(array: np.ndarray, num_heads: int) -> np.ndarray:
    pairs = array.reshape(num_heads, len(array) // num_heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def pack(array: np.ndarray, kind: Types, seed: int) -> np.ndarray:
    """Rows in a type; those that the package does not write are random blocks of it."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(array), kind)
    except NotImplementedError:
        size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        *counts, num_in = array.shape
        rows = random_blocks(kind.name, np.prod(counts), num_in // size * num_bytes, seed)
        return rows.reshape(*counts, -1)


def random_blocks(name: str, num_rows: int, row_bytes: int, seed: int) -> np.ndarray:
    """Rows of blocks with any bits in them, but scales as those of weights are."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
    block = gguf.GGML_QUANT_SIZES[Types[name]][1]
    if name == "MXFP4":
        exponents = random.integers(115, 124, (num_rows, row_bytes // block), dtype=np.uint8)
        exponents[0, :2] = 0, 1  # where its numbers are less than normal ones
        rows[:, ::block] = exponents
        return rows
    starts = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for start in starts.get(name, (0,)):
        scales = random.normal(0, 0.003, (num_rows, row_bytes // block)).astype("<f2")
        for byte in range(2):
            rows[:, start + byte :: block] = scales.view(np.uint8)[:, byte::2]
    return rows


def merged(tensors: Mapped) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Tensors as the converter has them, by its names, and the names of which they were made.

    Of each expert's matrices one stack; of gpt-oss's, with gates and ups in turn, two.
    """
    stacks: dict[str, dict[int, str]] = {}
    for name, array in tensors.items():
        each = re.fullmatch(r"(.*\.experts\.)(\d+)\.(.*)", name)
        stack = re.fullmatch(r"(.*\.experts\.)(gate_up|down)_proj(_bias)?", name)
        if each:
            stacks.setdefault(each[1] + each[3], {})[int(each[2])] = name
        elif stack:
            kind = ".bias" if stack[3] else ".weight"
            outputs = array if stack[3] else array.swapaxes(1, 2)
            if stack[2] == "down":
                yield f"{stack[1]}down_proj{kind}", [name], outputs
            else:
                for at, part in enumerate(("gate", "up")):
                    yield f"{stack[1]}{part}_proj{kind}", [name], outputs[:, at::2]
        else:
            yield (f"{name}.weight" if name.endswith("sinks") else name), [name], array
    for name, own in stacks.items():
        whole = [own[index] for index in range(len(own))]
        if "block_sparse_moe" in name:
            name = name.replace("model.layers", "layers").replace(
                "block_sparse_moe", "feed_forward"
            )
        yield name, whole, np.stack([tensors[each] for each in whole])


def write_gguf(
    model_dir: Path,
    path: Path,
    kind_of: Callable[[str], Types],
    *,
    tokenizer: bool = False,
    change: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Mapped:
    """Write a model directory as one file; what its tensors mean, by checkpoint names.

    `kind_of` a tensor's name there; vectors stay in float32.
    """
    config = json.loads((model_dir / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer, config)
    if tokenizer:
        add_tokenizer(writer, model_dir)
    change(writer)
    tensors = {
        name: tensor.float().numpy()
        for name, tensor in load_file(model_dir / "model.safetensors").items()
        if not (name == "lm_head.weight" and config["tie_word_embeddings"])
    }
    named = names_of(architecture, config.get("num_hidden_layers") or config["n_layer"])
    meaning: Mapped = {name: np.empty_like(tensor) for name, tensor in tensors.items()}
    for seed, (name, made_of, array) in enumerate(merged(tensors)):
        new = named(name)
        kind = kind_of(new) if array.ndim > 1 and not name.endswith("bias") else Types.F32
        done, undone = changes(config, architecture, new)
        rows = pack(done(array), kind, seed)
        writer.add_tensor(new, rows, raw_dtype=kind)
        values = undone(gguf.quants.dequantize(rows, kind))
        put_back(meaning, name, made_of, values)
    for name, factors in longrope(config).items():
        writer.add_tensor(f"rope_factors_{name}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: np.ascontiguousarray(values) for name, values in meaning.items()}


Change = Callable[[np.ndarray], np.ndarray]


def changes(config: dict, architecture: str, new: str) -> tuple[Change, Change]:
    """What is done to a tensor, and what undoes it."""
    stem, _, kind = new.rpartition(".")
    part = stem.split(".")[-1]
    if architecture == "gemma3" and "norm" in part:
        return lambda x: x + np.float32(1), lambda x: x - np.float32(1)
    if architecture == "gpt2" and stem.startswith("blk.") and kind == "weight":
        return np.transpose, np.transpose
    heads = config.get("num_attention_heads")
    count = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}.get(part)
    if architecture == "llama" and count is not None:
        return lambda x: paired(x, count), lambda x: unpaired(x, count)
    return lambda x: x, lambda x: x


def put_back(meaning: Mapped, name: str, made_of: list[str], values: np.ndarray) -> None:
    """The values of a tensor into those of which it was made."""
    if len(made_of) > 1 or re.search(r"experts\.\d", made_of[0]):
        for own, each in zip(made_of, values, strict=True):
            meaning[own] = each
        return
    target = meaning[made_of[0]]
    if ".experts." in name:
        turned = target if name.endswith("bias") else target.swapaxes(1, 2)
        step = 1 if "down" in name else 2
        turned[:, int("up_proj" in name) :: step] = values
    else:
        target[...] = values


def longrope(config: dict) -> Mapped:
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "longrope":
        return {}
    return {kind: np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}


def describe(writer: gguf.GGUFWriter, config: dict) -> None:
    """What config.json says."""
    add_ends(writer, config)
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    if config["model_type"] not in {"phi3", "olmo2", "olmo3"}:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_rope(writer, config, head_dim)
    add_experts(writer, config)
    add_windows(writer, config)


def add_ends(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def add_rope(writer: gguf.GGUFWriter, config: dict, head_dim: int) -> None:
    rope = config.get("rope_parameters") or config
    if "full_attention" in rope:
        if config["model_type"] == "gemma3_text":
            writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1)))
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    if config["model_type"] == "phi3":
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])
        if rope.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    elif kind == "longrope":
        factor = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors((1 + np.log(factor) / np.log(original)) ** 0.5)


def add_experts(writer: gguf.GGUFWriter, config: dict) -> None:
    count = config.get("num_local_experts") or config.get("num_experts")
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        inner = config.get("moe_intermediate_size")
        if config["model_type"] == "gpt_oss":
            inner = config["intermediate_size"]
        if inner:
            writer.add_expert_feed_forward_length(inner)


def add_windows(writer: gguf.GGUFWriter, config: dict) -> None:
    if config["model_type"] in {"gemma3_text", "olmo3", "gpt_oss", "phi3"}:
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if config["model_type"] == "olmo3":
        writer.add_sliding_window_pattern(
            [each == "sliding_attention" for each in config["layer_types"]]
        )


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
