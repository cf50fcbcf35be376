"""Models small enough to hold every split against one process."""

from tests.pipeline.oracles import kernels, make_oracle, native, smollm2_dir  # noqa: F401 - fixtures
