"""A Llama of `transformers` that decodes over an encoded cache.

The model computes as it did, but for two ways of calling it: `mode="prefill"` returns its cache
encoded, `mode="decode"` attends over encoded layers. Whatever needs a key happens beside the
model (home.py).
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from pipeline.dtypes import HostArray
from pipeline.scx.encoded_layer import EncodedLayer
from pipeline.scx.errors import CacheRefused, ScxError
from pipeline.scx.home import Home, Step
from pipeline.scx.keys import KeyGenerator
from pipeline.scx.kvcache import EncodedKVCache
from pipeline.scx.rows import Receipt
from pipeline.scx.tensors import numbers

_Transformers: TypeAlias = Any  # what is handed in, and what it hands in

_MODES = ("prefill", "decode")
_STEP = "scx_step"  # what carries a step through the model to its attention
# Of each tensor of a model, so many of its first and last numbers tell it from others.
_TOLD_NUMBERS = 256


def encode_llama(
    model: _Transformers, keys: KeyGenerator, *, decoy_ids: Sequence[int] | None = None
) -> _Transformers:
    """Give a LlamaForCausalLM the modes "prefill" and "decode" with these keys, and return it.

    decoy_ids: tokens of public text, of which decoy rows are made; without them tokens are drawn.
    Called again, it replaces the keys. Raises ScxError for a model that the keys do not fit.
    """
    _check_model(model, keys)
    if not hasattr(model, "scx"):
        for layer in model.model.layers:
            layer.self_attn.forward = _attention(layer.self_attn)
        model.forward = _modes(model, model.forward)
    decoys = _read_decoys(model, keys, decoy_ids) if keys.redundant_num else None
    model.scx = Home(keys, model.config.num_key_value_heads, decoys, _fingerprint(model))
    return model


def _check_model(model: _Transformers, keys: KeyGenerator) -> None:
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - nobody else needs it

    if not isinstance(model, LlamaForCausalLM):
        raise ScxError(f"encode_llama takes a LlamaForCausalLM, not a {type(model).__name__}")
    head_dim = model.model.layers[0].self_attn.head_dim
    if (keys.hidden_dim, keys.head_dim) != (model.config.hidden_size, head_dim):
        raise ScxError(
            f"the keys are for hidden_dim {keys.hidden_dim} and qk_hidden_dim {keys.head_dim}, "
            f"one head's; the model has {model.config.hidden_size} and {head_dim}"
        )
    num_layers = model.config.num_hidden_layers
    if beyond := sorted(layer for layer in keys.home_layers if layer >= num_layers):
        raise ScxError(f"the model has {num_layers} layers, and no layers {beyond}")


def _read_decoys(
    model: _Transformers, keys: KeyGenerator, decoy_ids: Sequence[int] | None
) -> list[tuple[HostArray, HostArray]]:
    """A layer's keys and values of other text, but for its first token.

    Every later query attends to a text's first row, so as a decoy it would hide all others.
    """
    count = keys.redundant_num + 1
    if decoy_ids is None:
        drawn = np.frombuffer(keys.stream(b"decoys", 8 * count), "<u8")
        ids = (drawn % np.uint64(model.config.vocab_size)).astype(np.int64)
    else:
        ids = np.asarray(decoy_ids)[:count]
        if ids.ndim != 1 or len(ids) < count or ids.dtype.kind not in "iu":
            raise ScxError(f"decoy_ids are at least {count} tokens for redundant_num")
        if ids.min() < 0 or ids.max() >= model.config.vocab_size:
            raise ScxError("decoy_ids are no tokens of this model")
    tokens = torch.as_tensor(ids.astype(np.int64), device=model.device)[None]
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    return [(numbers(each.keys[0, :, 1:]), numbers(each.values[0, :, 1:]))
            for each in cache.layers]  # fmt: skip


def _attention(attention: _Transformers) -> Callable[..., tuple[torch.Tensor, None]]:
    from transformers.models.llama.modeling_llama import (  # noqa: PLC0415
        apply_rotary_pos_emb,
    )

    plain = attention.forward

    @functools.wraps(plain)
    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: _Transformers = None,
        **kwargs: _Transformers,
    ) -> _Transformers:
        step = kwargs.pop(_STEP, None)
        if step is None:
            return plain(hidden_states, position_embeddings=position_embeddings, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        real = query if query.dtype == torch.float64 else query.float()
        output = step.attend(attention.layer_idx, real * attention.scaling, key, value)
        return attention.o_proj(output.to(hidden_states.dtype).flatten(2)), None

    return forward


def _modes(model: _Transformers, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(
        *args: _Transformers, mode: str | None = None, **kwargs: _Transformers
    ) -> _Transformers:
        if mode is None:
            return plain(*args, **kwargs)
        if mode not in _MODES:
            raise ScxError(f"mode is one of {_MODES}, or none, not {mode!r}")
        if args:
            kwargs["input_ids"], *more = args
            if more:
                raise ScxError("with a mode, all but input_ids is given by name")
        kwargs |= {"return_dict": True}
        kwargs.pop("use_cache", None)
        with torch.no_grad():
            return (_prefill if mode == "prefill" else _decode)(model, plain, **kwargs)

    return forward


def _prefill(
    model: _Transformers,
    plain: Callable[..., Any],
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: _Transformers,
) -> _Transformers:
    """As the model computes it, with an encoded cache."""
    if kwargs.get("past_key_values") is not None:
        raise ScxError('mode="prefill" starts a cache and takes none')
    home: Home = model.scx
    _check_batch(home.keys, input_ids)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or not mask.bool().any(1).all():
        raise ScxError("the attention mask is [sequences, tokens] and leaves each a token")
    output = plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **kwargs)
    cached = output.past_key_values.layers
    layers = {at: home.encode(at, each.keys, each.values, mask) for at, each in enumerate(cached)}
    output.past_key_values = EncodedKVCache(layers, home.keys.home_layers)
    return output


def _decode(
    model: _Transformers,
    plain: Callable[..., Any],
    *,
    input_ids: torch.Tensor,
    gpu_kvcache: EncodedKVCache | None = None,
    cpu_kvcache: EncodedKVCache | None = None,
    cache_position: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: _Transformers,
) -> _Transformers:
    """Tokens that follow an encoded cache, which then holds them as well; all of them or none."""
    home: Home = model.scx
    _check_batch(home.keys, input_ids)
    caches = [cache for cache in (gpu_kvcache, cpu_kvcache) if cache is not None]
    layers = _layers_of(caches, model.config.num_hidden_layers, len(input_ids))
    receipts = layers[0].receipts
    start, num_new = receipts[0].num_padding + receipts[0].num_rows, input_ids.shape[1]
    positions = torch.arange(start, start + num_new, device=input_ids.device)
    if cache_position is not None and cache_position.tolist() != positions.tolist():
        raise CacheRefused(0, f"{start} tokens, not those before {cache_position.tolist()}")
    _check_mask(attention_mask, receipts, num_new)
    home.check(layers)
    if position_ids is None:
        position_ids = positions[None].expand(len(input_ids), -1)
    outputs = []
    for at in range(num_new):
        one = slice(at, at + 1)
        step = Step(home, layers)
        outputs.append(plain(
            input_ids=input_ids[:, one], position_ids=position_ids[:, one],
            use_cache=False, **{_STEP: step}, **kwargs,
        ))  # fmt: skip
        layers = step.done
    home.note(layers)
    for cache in caches:
        cache.layers |= {layer: layers[layer] for layer in cache.layers}
    outputs[-1].logits = torch.cat([output.logits for output in outputs], 1)
    return outputs[-1]


def _layers_of(
    caches: list[EncodedKVCache], num_layers: int, num_sequences: int
) -> dict[int, EncodedLayer]:
    """All layers of a model, of which the caches have each once, and as much."""
    numbers = sorted(layer for cache in caches for layer in cache.layers)
    if numbers != list(range(num_layers)):
        raise ScxError(
            f"the caches have layers {numbers}; to decode it takes each of {num_layers} once"
        )
    layers = {layer: held for cache in caches for layer, held in cache.layers.items()}
    counts = [(r.num_first, r.num_rows, r.num_padding) for r in layers[0].receipts]
    for layer, held in layers.items():
        if len(held.receipts) != num_sequences or held.keys.shape[:1] != (num_sequences,):
            raise CacheRefused(layer, f"not as many sequences as the {num_sequences} of the step")
        if [(r.num_first, r.num_rows, r.num_padding) for r in held.receipts] != counts:
            raise CacheRefused(layer, "not as many rows as in layer 0")
    if len({num_rows + num_padding for _, num_rows, num_padding in counts}) != 1:
        raise CacheRefused(0, "its sequences do not end together")
    return layers


def _check_batch(keys: KeyGenerator, input_ids: torch.Tensor) -> None:
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ScxError("input_ids are [sequences, tokens], at least one of each")
    if len(input_ids) > keys.batch_size:
        raise ScxError(
            f"there are keys for {keys.batch_size} sequences (batch_size), not {len(input_ids)}"
        )


def _check_mask(mask: torch.Tensor | None, receipts: tuple[Receipt, ...], num_new: int) -> None:
    """The encoded cache lacks what was masked when it was made, and no more can be masked since."""
    if mask is None:
        return
    if mask.ndim != 2 or mask.sum(1).tolist() != [each.num_rows + num_new for each in receipts]:
        raise ScxError("the attention mask leaves other tokens than the encoded cache has")


def _fingerprint(model: _Transformers) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in model.state_dict().items():
        numbers = tensor.detach().reshape(-1)
        told = torch.cat((numbers[:_TOLD_NUMBERS], numbers[-_TOLD_NUMBERS:])).double()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + told.cpu().numpy().tobytes())
    return digest.digest()
