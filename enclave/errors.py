"""Everything that can go wrong with an image, under one root."""


class EnclaveError(Exception):
    """Root of every error this package raises."""


class EifError(EnclaveError):
    """The bytes are no acceptable enclave image; `offset` says where, when known."""

    def __init__(self, detail: str, *, offset: int | None = None) -> None:
        super().__init__(detail if offset is None else f"{detail} (at byte {offset})")
        self.detail = detail
        self.offset = offset


class CborError(EnclaveError):
    """The bytes are not one CBOR item of the kinds read here."""


class CpioError(EnclaveError):
    """The archive is malformed, or an entry cannot be written."""


class NsmError(EnclaveError):
    """The Nitro security module is absent, or refused a request."""


class BuildError(EnclaveError):
    """An image cannot be built from what was given."""


class EmulatorError(EnclaveError):
    """The emulated machine cannot be started."""
