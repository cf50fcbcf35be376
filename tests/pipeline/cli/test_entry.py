import gc

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
