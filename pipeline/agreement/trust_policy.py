"""What this process shows its peers and demands of them: local policy, never negotiated."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import fingerprint, load_identity
from pipeline.agreement.manifest import Manifest, StageSpec
from pipeline.errors import PolicyError
from transport.attestation.dev_authority import DevAttester, DevAuthority, dev_verifier
from transport.attestation.document_verifier import NitroVerifier, aws_root
from transport.attestation.evidence_binding import Attested, Binding
from transport.attestation.interfaces import Attester, Verifier
from transport.attestation.key_only import KeyOnlyAttester, KeyOnlyVerifier
from transport.attestation.nsm import NsmAttester
from transport.errors import AttestationError
from transport.frozen import frozen
from transport.handshake import Credentials, Role, RoleKind

logger = logging.getLogger(__name__)

DEV_WARNING = (
    "DEVELOPMENT MODE: evidence comes from a local development CA, nothing is attested. "
    "Whoever runs these processes can read every prompt."
)


class Trust(Protocol):
    """A policy: which credentials to use toward a peer that should have these measurements."""

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """Credentials for one link."""
        ...


def software_measurement(root: Path = Path(__file__).parents[2]) -> Mapping[int, bytes]:
    """SHA-384 over this installation's own source, shown as PCR 0 of development evidence.

    It tells two versions apart; it proves nothing, since whoever runs it chose it.
    """
    digest = hashlib.sha384()
    for package in ("pipeline", "transport"):
        for path in filter(Path.is_file, sorted((root / package).rglob("*.py"))):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha384(path.read_bytes()).digest())
    return {0: digest.digest()}


@frozen
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

    @classmethod
    def for_manifest(
        cls, manifest: Manifest, directory: Path, *, ignores_measurements: bool = False
    ) -> "DevTrust":
        """The same, for stages of which no proof is demanded that development cannot show.

        Raises PolicyError where the manifest names machines' keys, or pins measurements unless it
        `ignores_measurements`; MisuseError.
        """
        # Attack: whoever can pass a flag has pins looked past, and nothing says which.
        if manifest.is_keyed:
            raise PolicyError(
                "the manifest names its machines' keys, which --dev would not look at"
            )
        if pins := _described_pins(manifest):
            if not ignores_measurements:
                raise PolicyError(
                    f"the manifest pins measurements, and --dev would not compare them: {pins}; "
                    "leave out --dev, or add --ignore-measurements"
                )
            logger.warning("event=measurements_ignored detail=%r", pins)
        return cls.create(directory)

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """Measurements are not compared: development evidence cannot show an enclave's."""
        del peer, measurements
        return Credentials(self.static_key, self.attester, (self.verifier,))


@frozen
class EnclaveTrust:
    """A stage in an enclave: shows its NSM's document; knows orchestrators by their keys."""

    static_key: X25519PrivateKey
    attester: Attester
    manifest: Manifest
    root: x509.Certificate

    @classmethod
    def create(
        cls, manifest: Manifest, stage_idx: int, root: x509.Certificate | None = None
    ) -> "EnclaveTrust":
        """Trust neighbours under `root`, AWS's unless another program says so; no command does.

        Raises PolicyError unless the manifest pins weights and names its orchestrators.
        """
        _require_what_a_stage_needs(manifest, stage_idx)
        return cls(
            static_key=X25519PrivateKey.generate(),
            attester=NsmAttester(),
            manifest=manifest,
            root=root or aws_root(),
        )

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """What the manifest says of that peer: a listed key, or a document of its measurements."""
        verifier = _verifier(self.manifest, peer, measurements, self.root)
        return Credentials(self.static_key, self.attester, (verifier,))


@frozen
class KeyedTrust:
    """A machine that the manifest names by its key, for a stage or a part: nothing is attested."""

    static_key: X25519PrivateKey
    manifest: Manifest
    root: x509.Certificate

    @classmethod
    def create(cls, manifest: Manifest, stage_idx: int, key: X25519PrivateKey) -> "KeyedTrust":
        """Raises PolicyError unless the manifest has this key run the stage, and pins the rest."""
        _require_what_a_stage_needs(manifest, stage_idx)
        own = key.public_key().public_bytes_raw()
        if own not in _bytes_of(manifest.stage(stage_idx).machine_keys):
            raise PolicyError(
                f"the manifest has stage {stage_idx} run by other machines than this one, whose "
                f"key is {own.hex()}, {fingerprint(own)}"
            )
        return cls(key, manifest, aws_root())

    @classmethod
    def for_part(cls, manifest: Manifest, key: X25519PrivateKey) -> "KeyedTrust":
        """Raises PolicyError unless the manifest names this key as its part's, and its stage's."""
        part, own = manifest.part, key.public_key().public_bytes_raw()
        if part is None or part.public_key is None or bytes.fromhex(part.public_key) != own:
            raise PolicyError(
                f"the manifest names another part than this machine, whose key is {own.hex()}, "
                f"{fingerprint(own)}; `pipeline-orch plan --part-key` names it, --dev does without"
            )
        if not manifest.stage(0).machine_keys:
            raise PolicyError(
                "the manifest does not name the machine of the stage that asks; "
                "`pipeline-orch plan --stage-key` does, --dev does without"
            )
        return cls(key, manifest, aws_root())

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """What the manifest says of that peer; our own key is all that we show."""
        verifier = _verifier(self.manifest, peer, measurements, self.root)
        return Credentials(self.static_key, KeyOnlyAttester(), (verifier,))


@frozen
class UserTrust:
    """The user's orchestrator: shows its key; believes listed machines, and pinned measurements."""

    static_key: X25519PrivateKey
    manifest: Manifest
    root: x509.Certificate

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
        key = load_identity(identity)
        own = key.public_key().public_bytes_raw()
        if manifest.is_keyed and own not in _bytes_of(manifest.orchestrator_keys):
            raise PolicyError(
                f"the manifest lists other orchestrators than this one, whose key is {own.hex()}; "
                "use it where it was made, or --identity FILE with one of the keys it lists"
            )
        return cls(key, manifest, root or aws_root())

    def toward(self, peer: Role, measurements: Mapping[int, bytes]) -> Credentials:
        """What the manifest says of that stage: a listed key, or a document of measurements."""
        verifier = _verifier(self.manifest, peer, measurements, self.root)
        return Credentials(self.static_key, KeyOnlyAttester(), (verifier,))


def attested_verifier(
    manifest: Manifest, stage_idx: int, root: x509.Certificate | None = None
) -> Verifier:
    """Believes a stage's pinned measurements under `root`, for who needs to show nothing himself.

    Raises PolicyError when the manifest pins less than it must.
    """
    stage = manifest.stage(stage_idx)
    if stage.machine_keys:
        raise PolicyError(f"stage {stage_idx} is known by its machine's key and attests nothing")
    _require_pins(manifest, stage)
    return NitroVerifier(root or aws_root(), stage.measurements(), clock=_now)


def require_pinned(manifest: Manifest) -> None:
    """Refuse a manifest by which a stage would be refused, or would refuse everybody.

    Raises PolicyError.
    """
    for stage in manifest.stages:
        _require_pins(manifest, stage)
        _require_what_a_stage_needs(manifest, stage.stage_idx)


def _described_pins(manifest: Manifest) -> str:
    """Which measurements of which stages a manifest pins; empty where it pins none."""
    return "; ".join(
        f"stage {stage.stage_idx}'s PCR {', '.join(map(str, sorted(stage.expected_measurements)))}"
        for stage in manifest.stages
        if stage.expected_measurements
    )


def _require_pins(manifest: Manifest, stage: StageSpec) -> None:
    """Refuse a manifest that leaves open what a stage runs. Attack: pins that pin nothing."""
    measurements = stage.measurements()
    # PCR 0 covers the whole image; other registers alone let any code pass.
    is_pinned = any(measurements.get(0, b"")) and all(any(pcr) for pcr in measurements.values())
    missing = [
        name
        for name, is_there in (
            (
                "expected_measurements with a PCR 0 that is not zero",
                is_pinned or bool(stage.machine_keys),
            ),
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


def _require_what_a_stage_needs(manifest: Manifest, stage_idx: int) -> None:
    """Refuse a manifest by which a stage would compute on anything, or for nobody."""
    if not manifest.stage(stage_idx).weight_hashes:
        raise PolicyError(
            f"stage {stage_idx} has no weight_hashes in the manifest; "
            "`pipeline-orch plan` writes them, --dev does without"
        )
    if manifest.config_hash is None:
        raise PolicyError(
            "the manifest has no config_hash; `pipeline-orch plan` writes it, --dev does without"
        )
    if not manifest.orchestrator_keys:
        raise PolicyError(
            "the manifest lists no orchestrator_keys, so nobody could connect; "
            "`pipeline-orch keygen` makes one, --dev does without"
        )


@frozen
class _MachineVerifier:
    """Believes the machines that the manifest lists for a stage, and says so as SSH would."""

    listed: KeyOnlyVerifier
    stage_idx: int
    kind = KeyOnlyVerifier.kind

    def verify(self, evidence: bytes, binding: Binding) -> Attested:
        """Raises AttestationError for the key of any other machine."""
        try:
            return self.listed.verify(evidence, binding)
        except AttestationError as error:
            if error.check != "key":
                raise
            raise AttestationError(
                "key",
                f"THE KEY OF STAGE {self.stage_idx}'S MACHINE HAS CHANGED: what answers shows "
                f"{fingerprint(binding.static_key)}, which the manifest does not list. Somebody "
                "may be in between; if the machine was set up anew, pair it again with "
                "`stage-worker offer` and `pipeline-orch join`",
            ) from error


def _verifier(
    manifest: Manifest, peer: Role, measurements: Mapping[int, bytes], root: x509.Certificate
) -> Verifier:
    """Judges a peer by what the manifest says that it is known by. The core names it, not init."""
    if peer.kind is RoleKind.ORCHESTRATOR:
        return KeyOnlyVerifier(_bytes_of(manifest.orchestrator_keys))
    if peer.kind is RoleKind.PART:
        named = None if manifest.part is None else manifest.part.public_key
        return KeyOnlyVerifier(_bytes_of([] if named is None else [named]))
    keys = manifest.stage(peer.stage_idx).machine_keys
    if keys:
        return _MachineVerifier(KeyOnlyVerifier(_bytes_of(keys)), peer.stage_idx)
    return NitroVerifier(root, measurements, clock=_now)


def _bytes_of(keys: Iterable[str]) -> frozenset[bytes]:
    return frozenset(map(bytes.fromhex, keys))


def _now() -> datetime:
    return datetime.now(UTC)
