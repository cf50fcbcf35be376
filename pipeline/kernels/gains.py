"""What norms multiply by."""

import numpy as np

from pipeline.dtypes import Floats, HostArray, to_floats
from transport.frozen import frozen


@frozen
class Gain:
    """What a norm multiplies by, of what a checkpoint stores: (stored + shift) * scale."""

    shift: float = 0.0
    scale: float = 1.0

    def of(self, stored: HostArray) -> Floats:
        """In float32."""
        gain: Floats = (to_floats(stored) + np.float32(self.shift)) * np.float32(self.scale)
        return gain


AS_STORED = Gain()
