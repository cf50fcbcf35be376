"""Models small enough to hold against transformers."""

from tests.pipeline.oracles import *  # noqa: F403 - fixtures
