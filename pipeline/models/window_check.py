"""Whether a model's texts may slide: keep their first and their last rows, and drop those between.

A row that stays has to be told another position, and what is kept has to be in sight.
"""

from pipeline.dtypes import Floats
from pipeline.errors import InputError
from pipeline.models.model_config import ModelConfig
from pipeline.protocol.tide_window import TideWindow


def check_window(window: TideWindow, config: ModelConfig, frequencies: Floats | None) -> None:
    """`frequencies` of all layers, where they share them. Raises InputError saying why not."""
    if frequencies is None:
        raise InputError(
            f"{config.architecture} has no rotary positions that all layers share: the "
            "keys that a window keeps could not be told other positions"
        )
    longest = config.window or config.max_positions
    if window.size > longest:
        whose = "own window" if config.window else "context"
        raise InputError(
            f"a window of {window.size} positions is more than the model's {whose}, {longest}"
        )
