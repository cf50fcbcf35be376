import gc
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.cli.entry import importing

PACKAGES = ("pipeline.", "transport.")


def test_garbage_is_collected_again_once_everything_is_imported():
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        imported = [[]]
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    assert not any(each is imported for each in gc.get_objects())
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("command", ["stage_worker", "pipeline_orch"])
def test_no_library_starts_threads_or_runs_plugins_because_it_is_imported(command):
    program = (
        f"import sys, threading; from pipeline.cli.entry import {command} as command\n"
        "try: command()\n"
        "except SystemExit: pass\n"
        "from pydantic.plugin import _loader\n"
        "print(len(list(_loader.get_plugins())), len(__import__('os').listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    found = subprocess.run(
        [sys.executable, "-c", program, "--manifest", "none"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert found.stdout.split() == ["0", "1"]


@pytest.mark.parametrize("command", ["stage-worker", "pipeline-orch", "pipeline-relay"])
def test_every_command_says_which_version_it_is(command):
    path = Path(sys.executable).with_name(command)
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    assert told == f"{command} {version('veilpipe')}\n"


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        (
            "pipeline_orch",
            ("pipeline.kernels", "pipeline.models", "pipeline.offload", "pipeline.doors",
             "pipeline.gateway", "pipeline.gguf.header", "pipeline.placement.ray.messages",
             "pipeline.placement.worker_supervisor", "pipeline.sessions.sealing", "numpy.random",
             "httpx", "rich"),
        ),
        (
            "stage_worker",
            ("pipeline.engine", "pipeline.gguf.header", "pipeline.models.decoder",
             "pipeline.models.gpt2", "pipeline.sessions.sealing", "numpy.random", "tokenizers",
             "rich", "torch"),
        ),
    ],
)  # fmt: skip
def test_a_command_waits_for_no_library_that_most_runs_of_it_do_without(module, unused):
    code = f"import sys, pipeline.cli.{module}; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = result.stdout.split()
    assert [name for name in imported if name.startswith(unused)] == []


def test_looking_where_parts_of_a_model_are_waits_for_none_of_its_families(tmp_path):
    (tmp_path / "stage0").mkdir()
    (tmp_path / "stage0" / "config.json").touch()
    code = (
        "import sys, pipeline.cli.pipeline_orch, pathlib\n"
        "from pipeline.cli.shard_directories import client_dir, stage_dir\n"
        f"model = pathlib.Path({str(tmp_path)!r})\n"
        "assert client_dir(model) == model and stage_dir(model, 0) == model / 'stage0'\n"
        "print(*sys.modules, sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [name for name in result.stdout.split() if name.startswith("pipeline.models")] == []


@pytest.mark.parametrize("module", ["stage_worker", "pipeline_orch"])
def test_no_start_waits_for_seven_methods_of_each_frozen_class(module):
    code = (
        f"import gc, pipeline.cli.{module}\n"
        "for each in filter(lambda each: isinstance(each, type), gc.get_objects()):\n"
        "    parameters = each.__dict__.get('__dataclass_params__')\n"
        "    if parameters is not None and parameters.frozen and parameters.eq:\n"
        "        print(each.__module__, each.__qualname__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pydantic." in result.stdout  # so frozen dataclasses are found
    ours = [each for each in result.stdout.splitlines() if each.startswith(PACKAGES)]
    assert ours == []
