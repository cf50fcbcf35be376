"""The Modal app `stego-trtllm`: encode and decode by a TensorRT-LLM engine on a rented GPU.

Weights and built engines stay in the volume `stego-trtllm-volume`. Environment, when it is
deployed: STEGO_MODEL, STEGO_GPU, STEGO_FP8 (1 for it). The Modal secret `stego-trtllm` holds
HF_TOKEN, and STEGO_SECRET: 32 bytes as hexadecimal digits. The page beside this says how to deploy,
watch, stop and delete it.
"""

import importlib
import os
from pathlib import Path

import modal
from pydantic import BaseModel, Field

from pipeline.stego.adapters.encoder import StegoEncoder
from pipeline.stego.adapters.tensorrt_llm_model import TensorRtEngine, TensorRtSettings
from pipeline.stego.errors import StegoError
from pipeline.stego.keys import Secret

APP_NAME = "stego-trtllm"
VOLUME_NAME = "stego-trtllm-volume"
SECRET_NAME = "stego-trtllm"  # noqa: S105  # the name of one
CLASS_NAME = "Stego"

MODEL = os.environ.get("STEGO_MODEL", "HuggingFaceTB/SmolLM2-1.7B-Instruct")
GPU = os.environ.get("STEGO_GPU", "L4")
IS_FP8 = os.environ.get("STEGO_FP8", "0") == "1"
CACHE = Path("/cache")
# The last release line whose TensorRT engines can be built in it.
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.0.0"
# An engine of some billion parameters is built within the hour.
_SECONDS_TO_BUILD = 3600
_SECONDS_IDLE = 300

app = modal.App(APP_NAME)
volume = modal.Volume.from_name(VOLUME_NAME, create_if_missing=True)
image = (
    modal.Image.from_registry(IMAGE)
    .entrypoint([])
    .pip_install("cryptography>=48", "fastapi>=0.115", "pydantic>=2.10")
    .env(
        {
            "STEGO_MODEL": MODEL,
            "STEGO_GPU": GPU,
            "STEGO_FP8": str(int(IS_FP8)),
            "HF_HOME": str(CACHE / "weights"),
        }
    )
    .add_local_python_source("pipeline")
)


class EncodeBody(BaseModel):
    """What the endpoint for encoding is sent."""

    message: str = Field(min_length=1)
    prompt: str = Field(min_length=1)


class DecodeBody(BaseModel):
    """What the endpoint for decoding is sent."""

    text: str = Field(min_length=1)
    prompt: str = Field(min_length=1)


@app.cls(
    image=image,
    gpu=GPU,
    volumes={str(CACHE): volume},
    secrets=[modal.Secret.from_name(SECRET_NAME, required_keys=["HF_TOKEN", "STEGO_SECRET"])],
    timeout=_SECONDS_TO_BUILD,
    scaledown_window=_SECONDS_IDLE,
)
class Stego:
    """One engine in one container, which serves one call at a time."""

    model: str = modal.parameter(default=MODEL)

    @modal.enter()
    def load(self) -> None:
        """Load the engine, built first where the volume has none. Raises StegoError."""
        settings = TensorRtSettings(self.model, is_fp8=IS_FP8)
        secret = _secret()
        engine = TensorRtEngine(settings, CACHE / "engines")
        if not modal.is_local():
            volume.commit()
        self._encoder = StegoEncoder(engine, secret)

    @modal.method()
    def encode(self, message: str | bytes, prompt: str) -> str:
        """A text that carries the message. Raises StegoError."""
        return self._encoder.encode(message, prompt)

    @modal.method()
    def decode(self, text: str, prompt: str) -> bytes:
        """The message of a text. Raises StegoError."""
        return self._encoder.decode(text, prompt)

    # Attack: anybody may call an address on the web, and would have every text read to him.
    @modal.fastapi_endpoint(method="POST", requires_proxy_auth=True)
    def encode_web(self, body: EncodeBody) -> dict[str, str]:
        """`encode` over HTTP; 400 for what cannot be encoded."""
        try:
            return {"text": self._encoder.encode(body.message, body.prompt)}
        except StegoError as error:
            raise _refusal(str(error)) from error

    @modal.fastapi_endpoint(method="POST", requires_proxy_auth=True)
    def decode_web(self, body: DecodeBody) -> dict[str, str]:
        """`decode` over HTTP; 400 for what holds no message, or one that is no text."""
        try:
            return {"message": self._encoder.decode(body.text, body.prompt).decode()}
        except StegoError as error:
            raise _refusal(str(error)) from error
        except UnicodeDecodeError as error:
            raise _refusal("the message is no text; call decode from Python") from error


def _secret() -> Secret:
    """Raise StegoError where the environment has none."""
    try:
        return Secret(key=bytes.fromhex(os.environ.get("STEGO_SECRET", "")))
    except ValueError as error:
        raise StegoError("STEGO_SECRET is not written in hexadecimal digits") from error


def _refusal(reason: str) -> Exception:
    error: Exception = importlib.import_module("fastapi").HTTPException(400, reason)
    return error
