"""Keys and values of attention as somebody else may hold them: encoded, and attended to there."""

from pipeline.scx.codec import LayerCodec
from pipeline.scx.errors import AnswerRefused, CacheRefused, ScxError
from pipeline.scx.keys import KeyGenerator, SCXKeyGenerator
from pipeline.scx.kvcache import EncodedKVCache, split_kvcache_dynamic
from pipeline.scx.llama import encode_llama
from pipeline.scx.rows import Answer, EncodedRows, Receipt, attend

__all__ = [
    "Answer",
    "AnswerRefused",
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
