"""Keys and values of attention as somebody else may hold them: encoded, and attended to there."""

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.scx.codec import LayerCodec
from pipeline.scx.errors import AnswerRefused, CacheRefused, ScxError
from pipeline.scx.keys import KeyGenerator, SCXKeyGenerator
from pipeline.scx.rows import Answer, EncodedRows, Receipt, attend

if TYPE_CHECKING:
    from pipeline.scx.kvcache import EncodedKVCache, split_kvcache_dynamic
    from pipeline.scx.llama import encode_llama
    from pipeline.scx.tiers import AttentionTier

__all__ = [
    "Answer",
    "AnswerRefused",
    "AttentionTier",
    "CacheRefused",
    "EncodedKVCache",
    "EncodedRows",
    "KeyGenerator",
    "LayerCodec",
    "Receipt",
    "SCXKeyGenerator",
    "ScxError",
    "attend",
    "encode_llama",
    "split_kvcache_dynamic",
]

# What takes torch, whose import takes seconds: workers that hold rows do without.
_WITH_TORCH = {
    "EncodedKVCache": "pipeline.scx.kvcache",
    "split_kvcache_dynamic": "pipeline.scx.kvcache",
    "encode_llama": "pipeline.scx.llama",
    "AttentionTier": "pipeline.scx.tiers",
}


def __getattr__(name: str) -> object:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_WITH_TORCH[name]), name)
    return found
