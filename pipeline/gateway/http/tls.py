"""The server's certificate."""

import ssl
from pathlib import Path

from pipeline.errors import InputError


def load_tls(
    certificate: Path | None, key: Path | None, protocol: str = "http/1.1"
) -> ssl.SSLContext | None:
    """What TLS needs, from PEM files; None if neither is given. Raises InputError.

    `protocol`: by its name in ALPN, what is spoken inside.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InputError("--tls-cert and --tls-key belong together; give both")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    try:
        # Without a password, the library would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot use {certificate} and {key} for TLS: {reason}; "
            "give a PEM certificate chain and its key, without a passphrase"
        ) from error
    return context
