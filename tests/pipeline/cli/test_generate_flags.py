"""What a prompt's flags leave open is where the others say."""

import pytest

from pipeline.cli.generate_flags import GenerateFlags
from tests.pipeline.cli.test_settings import read


@pytest.mark.parametrize("at", ["model", "model/client", "model.gguf"])
def test_the_tokenizer_that_is_not_given_is_the_models_own(tmp_path, at):
    home = tmp_path / at
    home.mkdir(parents=True)
    (home / "config.json").write_text("{}")
    given = {"model_dir": tmp_path / at.split("/", maxsplit=1)[0]}
    assert read(GenerateFlags, tokenizer=None, **given).tokenizer_path == home / "tokenizer.json"
    assert read(GenerateFlags, tokenizer="t", **given).tokenizer_path.name == "t"
