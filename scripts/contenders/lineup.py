"""Who competes: the commands, the files they need, and what is missing on this machine."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from contenders.referee import Contender
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent
FLOOR = "reading the weights"
BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "int8": 1}
# llama.cpp's name for the same: 8 bits a weight, and a scale for every 32.
GGUF_TYPES = {"float32": "f32", "int8": "q8_0"}


class Missing(Exception):
    """Why a contender cannot compete here, and the remedy."""


def default_cache() -> Path:
    fallback = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(os.environ.get("VEILPIPE_BENCH_CACHE", f"{fallback}/veilpipe/bench"))


@dataclass(frozen=True)
class Field:
    """The model, the threads of every computing process, and where derived files are kept.

    `cpus`: what computes is pinned to these, as many as threads; none leaves that to the system.
    """

    model_dir: Path
    threads: int
    cache: Path
    cpus: tuple[int, ...] = ()

    def script(self, name: str, *args: object) -> tuple[str, ...]:
        return (sys.executable, str(HERE / name), *map(str, args))

    def pinned(self, command: tuple[str, ...]) -> tuple[str, ...]:
        """A command for something that knows no pinning of its own."""
        return ("taskset", "-c", ",".join(map(str, self.cpus)), *command) if self.cpus else command

    def derived(self, suffix: str) -> Path:
        return self.cache / "models" / f"{self.model_dir.resolve().name}-{suffix}"

    def gguf(self, kind: str) -> Path:
        name = GGUF_TYPES[kind]
        target = self.derived(f"{name}.gguf")
        if not is_current(target, self.model_dir):
            need("gguf")
            script = [sys.executable, SCRIPTS / "export_gguf.py"]
            make([*script, self.model_dir, target, "--type", name], target)
        return target

    def ctranslate2(self, kind: str) -> Path:
        target = self.derived(f"ct2-{kind}")
        if not is_current(target, self.model_dir):
            need("transformers")
            convert = "import sys; from ctranslate2.converters import TransformersConverter as C; "
            convert += "C(sys.argv[1]).convert(sys.argv[2], quantization=sys.argv[3], force=True)"
            make([sys.executable, "-P", "-c", convert, self.model_dir, target, kind], target)
        return target

    def llama_cpp(self) -> Path:
        program = self.cache / "llama_cpp"
        if not program.exists():
            raise Missing("not built; run scripts/build_llama_cpp.sh")
        return program


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Missing(f"{module} is not installed; run scripts/setup.sh bench")


def is_current(target: Path, model_dir: Path) -> bool:
    newest = max(path.stat().st_mtime for path in model_dir.glob("*.safetensors"))
    return target.exists() and target.stat().st_mtime >= newest


def make(command: list, target: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise Missing(f"{target.name} cannot be written: {lines[-1][:200]}")
    target.touch()


def num_weights_read(model_dir: Path) -> int:
    """Weights that every token needs: all but tables of which it takes one row."""
    is_tied = json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings", True)
    total = 0
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                is_table = name.endswith("wpe.weight") or (
                    name.endswith(("wte.weight", "embed_tokens.weight")) and not is_tied
                )
                total += 0 if is_table else prod(file.get_slice(name).get_shape())
    return total


def veilpipe(field: Field, kind: str, stages: int, wire: str = "F32") -> Contender:
    script = ("veilpipe_stages.py", field.model_dir, kind, field.threads, stages, wire)
    command = field.script(*script, *field.cpus)
    where = f"{stages} stages, encrypted" if stages else "one process"
    where += f", wire {wire}" if wire != "F32" else ""
    return Contender(
        f"veilpipe {kind}, {where}", kind, "veilpipe", max(stages, 1), field.threads, command
    )


def transformers(field: Field, kind: str) -> Contender:
    need("transformers")
    command = field.script("transformers_cpu.py", field.model_dir, kind, field.threads)
    command = field.pinned(command)
    return Contender(f"transformers {kind}", kind, "transformers", 1, field.threads, command)


def ctranslate2(field: Field, kind: str) -> Contender:
    need("ctranslate2")
    command = field.script("ctranslate2_cpu.py", field.ctranslate2(kind), field.threads)
    command = field.pinned(command)
    return Contender(f"CTranslate2 {kind}", kind, "ctranslate2", 1, field.threads, command)


def llama_cpp(field: Field, kind: str) -> Contender:
    command = (str(field.llama_cpp()), str(field.gguf(kind)), str(field.threads))
    command = field.pinned(command)
    name = f"llama.cpp {GGUF_TYPES[kind]}"
    return Contender(name, kind, "llama.cpp", 1, field.threads, command)


def llama_cpp_rpc(field: Field, kind: str) -> Contender:
    server = field.cache / "llama.cpp" / "build" / "bin" / "ggml-rpc-server"
    servers = (server, field.llama_cpp(), field.gguf(kind), field.threads)
    command = field.script("llama_cpp_rpc.py", *servers, *field.cpus)
    name = f"llama.cpp {GGUF_TYPES[kind]}, 2 RPC servers, in the clear"
    return Contender(name, kind, "llama.cpp rpc", 2, field.threads, command)


def floor(field: Field) -> Contender:
    num_bytes = num_weights_read(field.model_dir) * BYTES_PER_WEIGHT["float32"]
    command = field.pinned(field.script("memory_floor.py", num_bytes, field.threads))
    return Contender(FLOOR, "float32", "floor", 1, field.threads, command)


# Our stages with smaller activations between them; they compete when they are named.
WIRES = {
    f"veilpipe-{kind}-{stages}-{wire}": partial(veilpipe, kind=kind, stages=stages, wire=wire)
    for kind in BYTES_PER_WEIGHT
    for stages in (2, 3)
    for wire in ("F16", "BF16", "I8")
}
# Name on the command line -> how to make it.
LINEUP: dict[str, Callable[[Field], Contender]] = {
    **{
        f"veilpipe-{kind}-{stages or 'local'}": partial(veilpipe, kind=kind, stages=stages)
        for kind in BYTES_PER_WEIGHT
        for stages in (0, 2, 3)
    },
    "transformers-float32": partial(transformers, kind="float32"),
    "transformers-bfloat16": partial(transformers, kind="bfloat16"),
    "ctranslate2-float32": partial(ctranslate2, kind="float32"),
    "ctranslate2-int8": partial(ctranslate2, kind="int8"),
    "llama.cpp-float32": partial(llama_cpp, kind="float32"),
    "llama.cpp-int8": partial(llama_cpp, kind="int8"),
    "llama.cpp-rpc-float32": partial(llama_cpp_rpc, kind="float32"),
    "llama.cpp-rpc-int8": partial(llama_cpp_rpc, kind="int8"),
}


def matching(patterns: list[str]) -> list[str]:
    """Names that contain any of the patterns; those of WIRES must be spelled out."""
    usual = [name for name in LINEUP if any(pattern in name for pattern in patterns)]
    return usual + [name for name in WIRES if name in patterns]


def assemble(names: list[str], field: Field) -> Iterator[tuple[str, Contender | str]]:
    """Each name with its contender, or with why there is none."""
    for name in names:
        try:
            yield name, (LINEUP | WIRES)[name](field)
        except Missing as error:
            yield name, str(error)


def random_model(cache: Path) -> Path:
    """GPT-2's shape with random weights, made on first use."""
    target = cache / "models" / "gpt2-124m"
    script = SCRIPTS / "random_model.py"
    stamp = target / ".recipe"
    recipe = script.read_text()
    if not stamp.exists() or stamp.read_text() != recipe:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run([sys.executable, script, target], check=True)
        stamp.write_text(recipe)
    return target
