"""A stage's layers whose linears another worker computes, which sees masked rows, or mixed ones."""

import os
from typing import ClassVar

import numpy as np

from pipeline.errors import PartRefused
from pipeline.kernels.base import Kernels, Linear, LinearSpec
from pipeline.offload.freivalds import SecretVectors
from pipeline.offload.key_stream import KEY_BYTES
from pipeline.offload.linear_wire import LIMITS, question, rows_a_question, rows_untrusted
from pipeline.offload.masked_linear import MaskedLinears
from pipeline.offload.masks import Masks
from pipeline.offload.mixed_linear import MixedLinear
from pipeline.offload.ring import Words
from pipeline.offload.ring_linear import HEAD
from pipeline.remote_parts.parts import RemoteParts
from pipeline.remote_parts.wire import PartRefusal


class LinearParts(RemoteParts):
    """Asks for products, of all linears but the head: that stays with the embedding."""

    are_watched: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(LIMITS)

    def multiply(self, index: int, rows: Words, num_out: int) -> Words:
        """Have the session's worker multiply rows by a linear's weights, by its index.

        Raises PartLost, PartRefused.
        """
        most = rows_a_question(rows.shape[1], num_out)
        answers = []
        for first in range(0, len(rows), most):
            _, tensors = self.link.ask(*question(index, rows[first : first + most]))
            try:
                answers.append(rows_untrusted(tensors))
            except PartRefusal as error:
                raise PartRefused(f"the linear worker is none: {error}") from error
        return answers[0] if len(answers) == 1 else np.concatenate(answers)


class MaskedParts(LinearParts):
    """Rows leave under one-time masks."""

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self._linears = MaskedLinears(masks, self.multiply)

    def linear(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """The linear `name`, which has no weights here. Raises OtherMasks."""
        return kernels.linear(spec) if name == HEAD else self._linears.make(name, spec, kernels)


class MixedParts(LinearParts):
    """Rows of prompts leave mixed; of fewer than can be mixed none does."""

    # what is mixed differently is rounded differently
    are_row_exact: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._vectors = SecretVectors(os.urandom(KEY_BYTES))
        self._num_made = 0

    def linear(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """The linear `name`, with weights for the rows that stay."""
        if name == HEAD:
            return kernels.linear(spec)
        index, self._num_made = self._num_made, self._num_made + 1
        return MixedLinear(name, spec, kernels, self._vectors, self.multiply, index)
