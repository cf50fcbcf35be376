"""What a manifest says of the pieces of a weight file, so that a stage verifies those it needs."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from pipeline.agreement.addresses import Strict

# The hash of a whole file; as a field's name it may not be spelled in two ways.
FileName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_NumBytes = Annotated[int, Field(ge=1, le=1 << 50)]
_Hashes = Annotated[str, StringConstraints(pattern=r"^([0-9a-fA-F]{64})+$", to_lower=True)]


class PiecesSpec(Strict):
    """A weight file in pieces of `piece_bytes`, the last with what is left, and their hashes."""

    file_bytes: _NumBytes
    piece_bytes: _NumBytes
    hashes: _Hashes  # one behind the other: people read manifests

    @model_validator(mode="after")
    def _has_a_hash_for_each_piece(self) -> Self:
        count, found = -(-self.file_bytes // self.piece_bytes), len(self.hashes) // 64
        if found != count:
            raise ValueError(
                f"{found} hashes are given of {self.file_bytes} bytes in pieces of "
                f"{self.piece_bytes}, expected {count}; `pipeline-orch plan` writes them"
            )
        return self
