import gc
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.cli.entry import importing


def test_garbage_is_collected_again_once_everything_is_imported():
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        with pytest.raises(ImportError), importing():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("command", ["stage-worker", "pipeline-orch", "pipeline-relay"])
def test_every_command_says_which_version_it_is(command):
    path = Path(sys.executable).with_name(command)
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    assert told == f"{command} {version('veilpipe')}\n"
