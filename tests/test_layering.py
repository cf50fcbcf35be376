"""The architecture: what each room may import, and that no import goes round in a circle."""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.sources import ROOT, parsed

PACKAGES = ("transport", "pipeline", "enclave")

# What each room of `pipeline` may import beside `transport` and the modules that lie before all
# rooms (errors, dtypes, tasks, files, progress, units). An image carries what a stage imports.
ROOMS = {
    "codecs": set(),
    "sampling": set(),
    "agreement": {"codecs"},
    "protocol": {"agreement", "codecs", "sampling"},
    "gguf": set(),
    "weights": {"gguf"},
    "kernels": {"protocol", "weights"},
    "models": {"gguf", "kernels", "protocol", "weights"},
    "stage": {"agreement", "codecs", "kernels", "models", "protocol", "sampling"},
    "remote_parts": {"agreement", "kernels", "models", "protocol"},
    "engine": {"codecs", "gguf", "protocol", "sampling"},
    "placement": {"agreement"},
    "orchestrator": {
        "agreement", "codecs", "engine", "models", "placement", "protocol", "stage",
    },
    "planning": {"agreement", "codecs", "gguf", "kernels", "models", "weights"},
    "machines": {"agreement", "kernels", "models", "protocol", "stage", "weights"},
    "sessions": {"agreement", "engine", "kernels", "protocol"},
    # On the client's side a door takes the engine's steps, as a pipeline of stages does.
    "doors": {
        "agreement", "codecs", "engine", "gateway", "kernels", "models", "orchestrator",
        "protocol", "sessions", "stage",
    },
    "stego": {"engine", "sampling"},
    "scx": {"kernels", "models", "protocol", "remote_parts"},
    "offload": {"agreement", "kernels", "models", "protocol", "remote_parts", "weights"},
    "leakage": {
        "codecs", "engine", "kernels", "models", "offload", "planning", "protocol", "remote_parts",
        "scx", "weights",
    },
    "gateway": {"agreement", "engine", "gguf", "orchestrator", "protocol", "sampling", "stego"},
    "api": {"agreement", "engine", "models", "orchestrator", "protocol", "sampling", "stage"},
    "cli": {
        "agreement", "codecs", "doors", "engine", "gateway", "gguf", "kernels", "leakage",
        "machines", "models", "offload", "orchestrator", "placement", "planning", "protocol",
        "remote_parts", "sampling",
        "scx", "sessions", "stage", "stego",
    },
}  # fmt: skip
# What kernels know of the protocol: which rows of a step are whose, and which stay. All that doors
# know of the gateway is how a client's connection is bounded.
ONLY = {
    ("kernels", "protocol"): ("pipeline.protocol.batch", "pipeline.protocol.tide_window"),
    ("doors", "gateway"): ("pipeline.gateway.http.hypercorn_connection",),
}
# The door of the gateway that speaks HTTP; what lies behind it serves other doors as well.
HTTP_DOOR = "pipeline.gateway.http"
DOORS_LISTENING = "pipeline.doors.listening"
RUNPOD_DOOR = "pipeline.doors.runpod"
TENSORIZED = "pipeline.planning.tensorized"
RAY_ENGINE = "pipeline.placement.ray.engine"
HTTP_LIBRARIES = {"hypercorn", "starlette", "h11", "wsproto"}
MAX_LINES = 400
# What other people's engines call. The pipeline does not know it, and it imports no engine before
# it is used; only a Modal app cannot even be defined without Modal.
ADAPTERS = "pipeline.stego.adapters"
MODAL_APP = f"{ADAPTERS}.modal_app"
# What other people call from their own programs: its room's names are in one place, and the one
# module that alters their model imports what they have installed when it is called.
LIBRARIES = {"pipeline.scx", "pipeline.api"}
ALTERS_MODELS = "pipeline.scx.llama"
FORBIDDEN = {
    "transport": {"torch", "numpy", "pipeline", "enclave", "transformers"},
    "enclave": {"torch", "numpy", "pipeline", "transport", "transformers"},
    "pipeline": {"enclave", "transformers"},
}


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


MODULES = dict(modules())


def room_of(module):
    """The room of a module of `pipeline`; none for what lies before all rooms."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and parts[1:2] and parts[1] in ROOMS else None


@cache
def imports(path):
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def imports_at_once(path):
    """The lines of a module that import, whenever it is imported itself."""
    body = parsed(path).body
    return [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_a_package_imports_no_other_that_is_forbidden_to_it():
    for module, path in MODULES.items():
        package = module.partition(".")[0]
        found = {name.partition(".")[0] for name in imports(path)}
        found -= {"transformers"} if module == ALTERS_MODELS else set()
        assert not found & FORBIDDEN[package], module


def test_what_is_altered_is_imported_when_it_is():
    found = imports_at_once(MODULES[ALTERS_MODELS])
    assert found
    assert not [line for line in found if "transformers" in line]


@pytest.mark.parametrize("room", ROOMS)
def test_a_module_imports_only_from_rooms_below_its_own(room):
    within = [module for module in MODULES if room_of(module) == room]
    assert within
    for module in within:
        for name in imports(MODULES[module]):
            other = room_of(name)
            if other in {None, room}:
                continue
            assert other in ROOMS[room], f"{module} imports {name}: {room} must not know {other}"
            only = ONLY.get((room, other))
            assert only is None or name.startswith(only), f"{module} imports {name}, not {only}"


def test_only_adapters_know_how_other_engines_call():
    for module, path in MODULES.items():
        if not module.startswith(ADAPTERS):
            found = {name for name in imports(path) if name.startswith(ADAPTERS)}
            assert not found, f"{module} imports {found}"


def test_only_the_http_door_speaks_http():
    for module, path in MODULES.items():
        if module.startswith(HTTP_DOOR) or module == DOORS_LISTENING:
            continue
        found = set(imports(path))
        roots = {name.partition(".")[0] for name in found}
        assert not roots & HTTP_LIBRARIES, f"{module} imports {roots & HTTP_LIBRARIES}"
        if room_of(module) == "gateway":
            doors = {name for name in found if name.startswith(HTTP_DOOR)}
            assert not doors, f"{module} imports {doors}: the desk must not know its doors"


def test_grammars_are_compiled_by_who_serves_them_and_loaded_when_they_are_asked_for():
    for module, path in MODULES.items():
        if any("llguidance" in line for line in imports_at_once(path)):
            assert module == "pipeline.gateway.grammar_checker"  # a script
        if "llguidance" in {name.partition(".")[0] for name in imports(path)}:
            assert room_of(module) == "gateway"


def test_what_lies_before_all_rooms_imports_none():
    for module, path in MODULES.items():
        if module.startswith("pipeline") and room_of(module) is None:
            rooms = {room_of(name) for name in imports(path)} - {None}
            assert not rooms, f"{module} imports {rooms}"


@pytest.mark.parametrize("room", [*PACKAGES, "tests", "scripts"])
def test_a_file_is_short_enough_to_be_read_at_once(room):
    files = (path for path in (ROOT / room).rglob("*") if path.suffix in {".py", ".c", ".h"})
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files}
    assert lines
    assert not {path: count for path, count in lines.items() if count > MAX_LINES}


def test_every_room_has_its_rule_and_every_rule_its_room():
    rooms = {path.name for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").exists()}
    assert rooms == ROOMS.keys()


def test_no_import_goes_round_in_a_circle():
    graph = {
        module: {name for name in imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_an_init_holds_its_rooms_story_and_nothing_else():
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module not in LIBRARIES:
            body = parsed(path).body
            assert len(body) == 1, f"{module} runs code"
            assert isinstance(body[0], ast.Expr), f"{module} runs code"


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_librarys_init_names_what_is_public(library):
    story, *body = parsed(MODULES[library]).body
    assert isinstance(story, ast.Expr)
    (names,) = (
        node
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    at_once = {alias.name for node in body if isinstance(node, ast.ImportFrom)
               and node.module.startswith("pipeline") for alias in node.names}  # fmt: skip
    later = getattr(importlib.import_module(library), "_WITH_TORCH", {})
    assert set(ast.literal_eval(names.value)) == at_once | later.keys()
    assert all(hasattr(importlib.import_module(library), name) for name in later)


def test_an_engine_is_imported_by_who_speaks_with_it_and_when_it_does():
    for module, path in MODULES.items():
        found = imports_at_once(path)
        assert not any(re.match(r"(import|from) ray\b", line) for line in found), module


def test_workers_that_are_asked_import_no_torch():
    modules = "pipeline.scx.attention_worker, pipeline.scx.attention_parts"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr


def test_no_runtime_module_needs_a_test_dependency():
    standard = sys.stdlib_module_names
    allowed = {
        "coredis", "cryptography", "msgpack", "numpy", "pydantic", "rich", "safetensors",
        "tokenizers", "torch", "trio", "typer", *PACKAGES,
        # the gateway
        "hypercorn", "jinja2", "llguidance", "prometheus_client", "pydantic_core", "starlette",
        # doors and their clients
        "h2", "httpx",
        # fetching models
        "huggingface_hub",
        # objects for Kubernetes
        "yaml",
        # pictures, where somebody wants one
        "matplotlib", "segno",
    }  # fmt: skip
    for module, path in MODULES.items():
        roots = {name.partition(".")[0] for name in imports(path)}
        roots -= {"modal"} if module == MODAL_APP else set()
        roots -= {"runpod"} if module == RUNPOD_DOOR else set()
        roots -= {"tensorizer"} if module == TENSORIZED else set()
        roots -= {"ray"} if module == RAY_ENGINE else set()
        roots -= {"transformers"} if module == ALTERS_MODELS else set()
        assert roots <= allowed | standard, f"{module} imports {roots - allowed - standard}"
