"""What a GGUF file calls things, in the words of the checkpoints that families are written for.

Source: llama.cpp's `convert_hf_to_gguf.py`, undone.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from types import MappingProxyType

from pipeline.gguf import configurations
from pipeline.gguf.configurations import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    Factors,
    Fields,
)
from pipeline.gguf.header import (
    ARCHITECTURE_KEY,
    CorruptGguf,
    GgufHead,
    GgufTensor,
    Metadata,
    shown,
)
from transport.frozen import frozen

# Of a file, each expert's counted: hundreds of experts in a hundred layers are a tenth of it.
MAX_MEANINGS = 1 << 20
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.([a-z_]+)\.(weight|bias)")
_TURNED = re.compile(r"\.self_attn\.[qk]_proj\.")
_ENDS = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
# Where a name has a {}, a tensor has that of each expert, one behind another.
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_PARTS = _LAYER_PARTS | _NORMS_BEHIND | {"ffn_norm": "pre_feedforward_layernorm"}
_PHI_PARTS = _LAYER_PARTS | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_MIXTRAL_PARTS = _LAYER_PARTS | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SINKS = "self_attn.sinks"  # neither a weight nor a bias
_GPT_OSS_PARTS = (
    _LAYER_PARTS
    | _EXPERTS
    | {
        "attn_sinks": _SINKS,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
    }
)
_GPT2_ENDS = {
    EMBEDDING: "wte.weight",
    "position_embd.weight": "wpe.weight",
    "output_norm.weight": "ln_f.weight",
    "output_norm.bias": "ln_f.bias",
    HEAD: "lm_head.weight",
}
_GPT2_PARTS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# What would change the result and is not computed, where it is not 0.
_NOT_COMPUTED = (
    "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attn_logit_softcapping",
    "final_logit_softcapping", "embedding_scale", "residual_scale", "logit_scale",
    "expert_shared_count", "expert_group_count",
)  # fmt: skip


@frozen
class Meaning:
    """What a tensor is in checkpoints, and what was done to it there is to undo.

    `tensor`: where it lies; of a stack of experts' that of one. `pair_rows`: the rows of a head,
    which lie as rotary pairs and not half a head apart; 0 where they lie as in checkpoints.
    `added`: to each of its values. `is_turned`: its rows are a checkpoint's columns.
    """

    tensor: GgufTensor
    name: str
    pair_rows: int = 0
    added: float = 0.0
    is_turned: bool = False


@frozen
class Architecture:
    """A family by GGUF's name: what it is in checkpoints, and what their config.json says."""

    parts: Mapping[str, str]
    fields: Callable[[GgufHead, Factors], Fields]
    ends: Mapping[str, str] = field(default_factory=lambda: _ENDS)
    layers: str = "model.layers"
    has_experts: bool = False
    has_pairs: bool = False
    norms_added: float = 0.0
    is_in_out: bool = False


def meanings(head: GgufHead) -> Iterator[Meaning]:
    """What each weight of the file is, in the order of their bytes.

    Raises CorruptGguf for one that has no meaning.
    """
    kind = _architecture(head.metadata)
    pair_rows, left = configurations.head_dim(head) if kind.has_pairs else 0, MAX_MEANINGS
    for tensor in head.tensors:
        if tensor.name in ROPE_FACTORS:
            continue
        name = _checkpoint_name(tensor.name, kind)
        rows = pair_rows if _TURNED.search(name) else 0
        if rows and (rows % 2 or not tensor.shape or tensor.shape[0] % rows):
            raise CorruptGguf(
                f"tensor {shown(tensor.name)} has the shape {list(tensor.shape)}, which is no "
                f"heads of {rows} rows"
            )
        added = kind.norms_added if name.endswith("norm.weight") else 0.0
        is_turned = kind.is_in_out and len(tensor.shape) == 2 and name.startswith(kind.layers)
        if "{}" in name:
            experts = _of_experts(head, tensor)
            if (left := left - len(experts)) < 0:
                raise CorruptGguf(f"it has more than {MAX_MEANINGS} tensors of experts")
            yield from (Meaning(own, name.format(index)) for index, own in enumerate(experts))
        else:
            yield Meaning(tensor, name, rows, added, is_turned)


def _of_experts(head: GgufHead, stack: GgufTensor) -> list[GgufTensor]:
    """Each expert's own part of a stack."""
    count = configurations.num_experts(head)
    size = (stack.end - stack.start) // count
    # Whoever reads a file makes something of each: it has to have bytes for it.
    if not stack.shape or stack.shape[0] != count or size == 0 or count > MAX_MEANINGS:
        raise CorruptGguf(
            f"tensor {shown(stack.name)} has the shape {list(stack.shape)}, and there are {count} "
            "experts"
        )
    starts = range(stack.start, stack.start + count * size, size)
    return [replace(stack, shape=stack.shape[1:], start=at, end=at + size) for at in starts]


def config_fields(head: GgufHead, factors: Factors) -> Fields:
    """The config.json that a checkpoint of this model has. Raises CorruptGguf.

    `factors`: what `ROPE_FACTORS` of the file hold.
    """
    return _architecture(head.metadata).fields(head, factors)


def _architecture(metadata: Metadata) -> Architecture:
    name = metadata.text(ARCHITECTURE_KEY)
    if name is None:
        raise CorruptGguf(f"its {ARCHITECTURE_KEY} is missing")
    if name not in ARCHITECTURES:
        *others, last = ARCHITECTURES
        raise CorruptGguf(
            f"its architecture {name[:40]!r} is not supported: use a {', '.join(others)} or "
            f"{last} model"
        )
    if (num_parts := metadata.size("split.count") or 1) > 1:
        raise CorruptGguf(f"it is one of {num_parts} parts: merge them with llama-gguf-split")
    for key in _NOT_COMPUTED:
        if value := metadata.number(f"{name}.{key}"):
            raise CorruptGguf(f"its {name}.{key} is {value}, which is not computed")
    found = ARCHITECTURES[name]
    if metadata.size(f"{name}.expert_count") and not found.has_experts:
        if name != "llama":
            raise CorruptGguf(f"it is a mixture of experts, which {name} models are not read as")
        return MIXTRAL
    return found


def _checkpoint_name(name: str, kind: Architecture) -> str:
    if name in kind.ends:
        return kind.ends[name]
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] not in kind.parts:
        raise CorruptGguf(f"it has a tensor {shown(name)}, which no model of its kind has")
    part = kind.parts[layer[2]]
    return f"{kind.layers}.{layer[1]}.{part}" + ("" if part == _SINKS else f".{layer[3]}")


# In GGUF's words a Llama.
MIXTRAL = Architecture(_MIXTRAL_PARTS, configurations.mixtral, has_experts=True, has_pairs=True)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(_LAYER_PARTS, configurations.llama, has_pairs=True),
        "qwen2": Architecture(_LAYER_PARTS, configurations.qwen2),
        "qwen3": Architecture(_LAYER_PARTS, configurations.qwen3),
        "qwen3moe": Architecture(
            _LAYER_PARTS | _EXPERTS, configurations.qwen3_moe, has_experts=True
        ),
        "gemma3": Architecture(_GEMMA_PARTS, configurations.gemma3, norms_added=1.0),
        "olmo2": Architecture(_LAYER_PARTS | _NORMS_BEHIND, configurations.olmo),
        "phi3": Architecture(_PHI_PARTS, configurations.phi3),
        "gpt-oss": Architecture(_GPT_OSS_PARTS, configurations.gpt_oss, has_experts=True),
        "gpt2": Architecture(
            _GPT2_PARTS, configurations.gpt2, ends=_GPT2_ENDS, layers="h", is_in_out=True
        ),
    }
)
