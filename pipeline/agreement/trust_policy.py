"""What this process shows its peers and demands of them: local policy, never negotiated."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.manifest import Manifest, StageSpec
from pipeline.errors import InputError, PolicyError
from transport.attestation.dev_authority import DevAttester, DevAuthority, dev_verifier
from transport.attestation.document_verifier import NitroVerifier, aws_root
from transport.attestation.interfaces import Attester, Verifier
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.attestation.nsm import NsmAttester
from transport.errors import MisuseError
from transport.handshake import Credentials, Role, RoleKind
from transport.private_files import create_private, read_private

DEV_WARNING = (
    "DEVELOPMENT MODE: evidence comes from a local development CA, nothing is attested. "
    "Whoever runs these processes can read every prompt."
)


class Trust(Protocol):
    """A policy: which credentials to use toward a peer that should have these measurements."""

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """Credentials for one link."""
        ...


def software_measurement() -> Mapping[int, bytes]:
    """SHA-384 over this installation's own source, shown as PCR 0 of development evidence.

    It tells two versions apart; it proves nothing, since whoever runs it chose it.
    """
    digest = hashlib.sha384()
    root = Path(__file__).resolve().parent.parent
    for package in ("pipeline", "transport"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha384(path.read_bytes()).digest())
    return {0: digest.digest()}


@dataclass(frozen=True, slots=True)
class DevTrust:
    """Development: evidence of the local development CA on both sides."""

    static_key: X25519PrivateKey
    attester: Attester
    verifier: Verifier

    @classmethod
    def create(cls, directory: Path) -> "DevTrust":
        """Load the development CA, or make one on first use. Raises MisuseError."""
        authority = DevAuthority.load_or_create(directory)
        return cls(
            static_key=X25519PrivateKey.generate(),
            attester=DevAttester(authority, software_measurement()),
            verifier=dev_verifier(authority.root_cert, None),
        )

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """Measurements are not compared: development evidence cannot show an enclave's."""
        del peer, measurements
        return Credentials(self.static_key, self.attester, (self.verifier,))


@dataclass(frozen=True, slots=True)
class EnclaveTrust:
    """A stage in an enclave: shows its NSM's document; knows orchestrators by their keys."""

    static_key: X25519PrivateKey
    attester: Attester
    orchestrator_keys: frozenset[bytes]
    root: x509.Certificate

    @classmethod
    def create(
        cls, manifest: Manifest, stage_idx: int, root: x509.Certificate | None = None
    ) -> "EnclaveTrust":
        """Trust neighbours under `root`, AWS's unless another program says so; no command does.

        Raises PolicyError unless the manifest pins weights and names its orchestrators.
        """
        stage = manifest.stage(stage_idx)
        if not stage.weight_hashes:
            raise PolicyError(
                f"stage {stage_idx} has no weight_hashes in the manifest; "
                "`pipeline-orch plan` writes them, --dev does without"
            )
        if manifest.config_hash is None:
            raise PolicyError(
                "the manifest has no config_hash; `pipeline-orch plan` writes it, "
                "--dev does without"
            )
        if not manifest.orchestrator_keys:
            raise PolicyError(
                "the manifest lists no orchestrator_keys, so nobody could connect; "
                "`pipeline-orch keygen` makes one, --dev does without"
            )
        return cls(
            static_key=X25519PrivateKey.generate(),
            attester=NsmAttester(),
            orchestrator_keys=_listed_keys(manifest),
            root=root or aws_root(),
        )

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """Key-only evidence from an orchestrator, a Nitro document from a neighbour."""
        verifier: Verifier
        if peer.kind is RoleKind.ORCHESTRATOR:
            verifier = KeyOnlyVerifier(self.orchestrator_keys)
        else:
            verifier = NitroVerifier(self.root, measurements, clock=_now)
        return Credentials(self.static_key, self.attester, (verifier,))


@dataclass(frozen=True, slots=True)
class KeyedTrust:
    """A process without a security module, among others that the manifest names by their keys."""

    static_key: X25519PrivateKey
    manifest: Manifest

    @classmethod
    def create(cls, manifest: Manifest, identity: Path | None) -> "KeyedTrust":
        """Raises PolicyError where the manifest leaves open who is who."""
        part = manifest.part
        named = [stage.public_key for stage in manifest.stages]
        named += [] if part is None else [part.public_key]
        if not manifest.orchestrator_keys or None in named or identity is None:
            raise PolicyError(
                "orchestrator, stages and part know each other by their keys: the manifest has to "
                "name them all (`pipeline-orch plan --orchestrator-key, --stage-key, --part-key`), "
                "and --identity FILE gives this one's (`pipeline-orch keygen FILE` makes one); "
                "--dev does without"
            )
        return cls(load_identity(identity), manifest)

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """Key-only evidence on both sides."""
        del measurements
        verifier = KeyOnlyVerifier(self._keys_of(peer))
        return Credentials(self.static_key, KeyOnlyAttester(), (verifier,))

    def _keys_of(self, peer: Role) -> frozenset[bytes]:
        if peer.kind is RoleKind.ORCHESTRATOR:
            return _listed_keys(self.manifest)
        spec = self.manifest.part
        named = spec if peer.kind is RoleKind.PART else self.manifest.stage(peer.stage_idx)
        key = None if named is None else named.public_key
        return frozenset() if key is None else frozenset({bytes.fromhex(key)})


@dataclass(frozen=True, slots=True)
class UserTrust:
    """The user's orchestrator: shows its key; believes pinned measurements under AWS's root.

    Of stages on machines of the user's own it believes the key that the manifest names.
    """

    static_key: X25519PrivateKey
    root: x509.Certificate
    stage_keys: Mapping[int, bytes] = field(default_factory=dict)

    @classmethod
    def create(
        cls, manifest: Manifest, identity: Path | None, root: x509.Certificate | None = None
    ) -> "UserTrust":
        """Trust stages under `root`, AWS's unless another program says so; no command does.

        Raises PolicyError when the manifest pins less than it must.
        """
        for stage in manifest.stages:
            _require_pins(manifest, stage)
        if identity is None:
            raise PolicyError(
                "attested stages know this orchestrator by its key; give --identity FILE "
                "(`pipeline-orch keygen FILE` makes one), or use --dev on your own machine"
            )
        keys = {
            stage.stage_idx: bytes.fromhex(stage.public_key)
            for stage in manifest.stages
            if stage.public_key is not None
        }
        return cls(load_identity(identity), root or aws_root(), keys)

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """A Nitro document with these measurements, or of a machine of one's own its key."""
        verifier: Verifier
        if (key := self.stage_keys.get(peer.stage_idx)) is not None:
            verifier = KeyOnlyVerifier(frozenset({key}))
        else:
            verifier = NitroVerifier(self.root, measurements, clock=_now)
        return Credentials(self.static_key, KeyOnlyAttester(), (verifier,))


def attested_verifier(
    manifest: Manifest, stage_idx: int, root: x509.Certificate | None = None
) -> Verifier:
    """Believes a stage's pinned measurements under `root`, for who needs to show nothing himself.

    Raises PolicyError when the manifest pins less than it must.
    """
    stage = manifest.stage(stage_idx)
    _require_pins(manifest, stage)
    return NitroVerifier(root or aws_root(), stage.measurements(), clock=_now)


def _require_pins(manifest: Manifest, stage: StageSpec) -> None:
    """Refuse a manifest that leaves open what a stage runs. Attack: pins that pin nothing."""
    measurements = stage.measurements()
    # PCR 0 covers the whole image; other registers alone let any code pass.
    is_pinned = any(measurements.get(0, b"")) and all(any(pcr) for pcr in measurements.values())
    # Known by its key it is a machine of the user's own, who knows what he runs there.
    is_pinned = is_pinned or stage.public_key is not None
    missing = [
        name
        for name, is_there in (
            ("expected_measurements with a PCR 0 that is not zero", is_pinned),
            ("weight_hashes", bool(stage.weight_hashes)),
            ("config_hash", manifest.config_hash is not None),
        )
        if not is_there
    ]
    if missing:
        raise PolicyError(
            f"stage {stage.stage_idx} has no {' and no '.join(missing)} in the manifest, "
            "so nothing says what runs there; pin them, or use --dev on your own machine"
        )


def create_identity(path: Path) -> str:
    """Write a new X25519 key, readable by its owner alone; returns the public key as hex.

    Raises InputError.
    """
    key = X25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        create_private(path, pem)
    except MisuseError as error:
        raise PolicyError(f"cannot create key file {path}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot create key file {path}: {error.strerror}") from error
    return key.public_key().public_bytes_raw().hex()


def load_identity(path: Path) -> X25519PrivateKey:
    """Read a key written by `create_identity`. Raises InputError."""
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except MisuseError as error:
        raise PolicyError(f"key file {error}") from error
    except OSError as error:
        raise InputError(f"cannot read key file {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is not a key file; `pipeline-orch keygen` makes one") from error
    if not isinstance(key, X25519PrivateKey):
        raise InputError(f"{path} holds another kind of key; `pipeline-orch keygen` makes X25519")
    return key


def _listed_keys(manifest: Manifest) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(key) for key in manifest.orchestrator_keys)


def _now() -> datetime:
    return datetime.now(UTC)
