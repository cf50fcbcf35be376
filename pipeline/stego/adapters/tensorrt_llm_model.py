"""A TensorRT-LLM engine: built once for each model and precision, kept in a directory, and run."""

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch

from pipeline.stego.adapters.encoder import TextTokenizer
from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.adapters.tensorrt_llm import LogitsCallback
from pipeline.stego.errors import StegoError

_TensorRt: TypeAlias = Any  # the library's own: nothing of it is imported here

# Whatever would choose tokens before the callback is asked, by the library's names.
_SPECULATIVE = ("speculative_config", "decoding_config", "lookahead_config", "speculative_model")
# With a process for the worker, the callback is a copy there, and what it learns is lost. Without
# the second, what a prompt shares with an earlier one is computed once, in other sums.
_ENVIRONMENT = {"TLLM_WORKER_USE_SINGLE_PROCESS": "1", "FORCE_DETERMINISTIC": "1"}


@dataclass(frozen=True, slots=True)
class TensorRtSettings:
    """Which engine: a Hugging Face name or directory, and how it is built.

    `options` go to TensorRT-LLM's `LLM`, but for `kv_cache_config`, which is set here. Raises
    StegoError for speculative decoding.
    """

    model: str
    is_fp8: bool = False
    max_seq_len: int = 4096
    max_batch_size: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _SPECULATIVE:
            if self.options.get(name) is not None:
                raise StegoError(
                    f"{name}: speculative decoding takes tokens that no message has chosen; "
                    "leave it out"
                )


class TensorRtEngine:
    """An engine of TensorRT-LLM, from the cache or built into it."""

    def __init__(self, settings: TensorRtSettings, cache_dir: Path) -> None:
        """Minutes where it has to be built. Raises StegoError without TensorRT-LLM."""
        os.environ.update(_ENVIRONMENT)
        library = _library("tensorrt_llm")
        self._sampling_params = library.SamplingParams
        self._llm = _load(library, settings, cache_dir)
        tokenizer = _library("transformers").AutoTokenizer.from_pretrained(settings.model)
        self.tokenizer: TextTokenizer = tokenizer
        self.end_token_id: int = tokenizer.eos_token_id
        self.special_token_ids: Sequence[int] = tokenizer.all_special_ids
        self.fingerprint = _name(library, settings)

    def generate(
        self, prompt_ids: Sequence[int], request: StegoRequest, max_tokens: int
    ) -> Sequence[int]:
        """As `Engine.generate`."""
        callback = LogitsCallback()
        callback.begin(request, prompt_ids)
        params = self._sampling_params(
            max_tokens=max_tokens,
            end_id=self.end_token_id,
            top_k=1,  # of the one token that is left
            logits_processor=callback,
            detokenize=False,
        )
        output = self._llm.generate({"prompt_token_ids": list(prompt_ids)}, params, use_tqdm=False)
        generated: Sequence[int] = output.outputs[0].token_ids
        return generated


def _name(library: ModuleType, settings: TensorRtSettings) -> str:
    """All that decides what is built, and so the numbers. Raises StegoError."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        return json.dumps([library.__version__, kind, asdict(settings)], sort_keys=True)
    except TypeError as error:  # an object's representation differs in every process
        raise StegoError(f"options have to be numbers, text, lists and maps: {error}") from error


def _load(library: ModuleType, settings: TensorRtSettings, cache_dir: Path) -> _TensorRt:
    name = hashlib.sha256(_name(library, settings).encode()).hexdigest()[:16]
    engine_dir = cache_dir / f"{Path(settings.model).name}-{name}"
    llm_class = _library("tensorrt_llm._tensorrt_engine").LLM
    api = _library("tensorrt_llm.llmapi")
    kv_cache = api.KvCacheConfig(enable_block_reuse=False)
    options = {**settings.options, "kv_cache_config": kv_cache}
    if engine_dir.is_dir():
        return llm_class(model=str(engine_dir), tokenizer=settings.model, **options)
    options["build_config"] = api.BuildConfig(
        max_batch_size=settings.max_batch_size,
        max_seq_len=settings.max_seq_len,
        max_beam_width=1,
    )
    if settings.is_fp8:
        fp8 = api.QuantAlgo.FP8
        options["quant_config"] = api.QuantConfig(quant_algo=fp8, kv_cache_quant_algo=fp8)
    llm = llm_class(model=settings.model, **options)
    _keep(llm, engine_dir)
    return llm


def _keep(llm: _TensorRt, engine_dir: Path) -> None:
    """Save the engine whole or not at all: a directory that is there is taken for one."""
    engine_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=engine_dir.parent))
    try:
        llm.save(str(unfinished))
        unfinished.rename(engine_dir)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise StegoError(
            f"{name} cannot be imported ({error}); use an image or environment with "
            "TensorRT-LLM 1, in which its TensorRT engines still are"
        ) from error
