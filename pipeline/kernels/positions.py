"""Where a step's rows stand in their texts."""

import numpy as np

from pipeline.dtypes import HostArray
from pipeline.protocol.batch import Batch


def batch_positions(batch: Batch) -> HostArray:
    """Position of every row, [rows] int64."""
    ranges = [np.arange(each.position, each.position + each.num_tokens) for each in batch]
    return np.concatenate(ranges)
