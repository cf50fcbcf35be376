"""Models small enough to hold against transformers."""

from tests.pipeline.oracles import (  # noqa: F401 - fixtures
    _quiet_oracle,
    kernels,
    make_cache,
    make_oracle,
    make_pipeline,
    native,
    oracle,
    oracle_class,
    same_random_numbers,
    smollm2_dir,
    token_ids,
)
