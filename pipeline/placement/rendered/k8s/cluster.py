"""What a user says of a cluster, and how things are called there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal, get_args

from pipeline.agreement.addresses import StageEndpoint, TcpAddress, VsockAddress
from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError
from transport.dial_and_listen import PARENT_CID

# What pods listen at; each has an address of its own.
CONTROL_PORT, DATA_PORT, HEALTH_PORT = 9000, 9001, 9002
# In an enclave, where `pipeline-orch shard` has a stage listen, and where it sends results.
ENCLAVE_CONTROL_PORT, ENCLAVE_DATA_PORT, ENCLAVE_OUT_PORT = 5000, 5001, 6000
FIRST_CID = 16

Kind = Literal["leaderworkerset", "statefulset"]
Objects = list[dict[str, object]]

# RFC 1123 labels; services begin with a letter. With "-stage-255" and the ten digits of a
# controller's revision behind it a name still has to be a label of at most 63 characters.
_MAX_NAME = 40
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_MAX_SUBDOMAIN = 253
# Of an image: [HOST[:PORT]/]PATH[:TAG][@DIGEST]. Source: github.com/distribution/reference.
_HOST = r"([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"({_HOST}(\.{_HOST})*|\[[0-9a-fA-F:]+\])(:[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?P<name>({_DOMAIN}/)?{_COMPONENT}(/{_COMPONENT})*)"
    r"(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_MAX_IMAGE_NAME = 255
_PART = r"(?!\.\.?(?:/|$))[\w.-]+"  # of a path, which leads nowhere back
_PATH = re.compile(rf"(/{_PART})+", re.ASCII)
_FILE = re.compile(rf"{_PART}(/{_PART})*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Names and places. Raises InputError for what no cluster would take."""

    image: str
    kind: Kind = "leaderworkerset"
    name: str = "veilpipe"
    namespace: str = "default"
    # The claim of the volume with all parts, each mounted into its own stage alone.
    claim: str = "veilpipe-parts"
    # On a node: a directory stageI with the key that was made there.
    keys_path: str = "/var/lib/veilpipe"
    # Of variables for workers, and for pulling images.
    secret: str | None = None
    pull_secret: str | None = None
    # From where orchestrators come that are no pods of this name.
    networks: Sequence[str] = ()
    # What has nitro-cli, the group of /dev/nitro_enclaves, and a profile that allows AF_VSOCK.
    enclave_image: str | None = None
    enclave_group: int = 0
    enclave_seccomp: str = "veilpipe-vsock.json"

    def __post_init__(self) -> None:
        """Check names as the cluster would."""
        if self.kind not in get_args(Kind):
            raise InputError(f"--kind {self.kind}: use {', '.join(get_args(Kind))}")
        if not self.name[:1].isalpha() or len(self.name) > _MAX_NAME:
            _refuse("--name", self.name, f"a letter first and {_MAX_NAME} characters at most")
        _check("--name", self.name, _LABEL, "lower-case letters, digits and dashes (RFC 1123)")
        _check("--namespace", self.namespace, _LABEL, "a label of RFC 1123")
        for flag, name in (
            ("--claim", self.claim),
            ("--secret", self.secret),
            ("--pull-secret", self.pull_secret),
        ):
            if name is not None and len(name) > _MAX_SUBDOMAIN:
                _refuse(flag, name, f"{_MAX_SUBDOMAIN} characters at most")
            _check(flag, name, _SUBDOMAIN, "a name of RFC 1123")
        if not self.image:
            raise InputError(
                "--image is empty; name the image that `python -m enclave container` makes"
            )
        _check_image("--image", self.image)
        _check_image("--enclave-image", self.enclave_image)
        _check("--keys-path", self.keys_path, _PATH, "an absolute path")
        _check("--enclave-seccomp", self.enclave_seccomp, _FILE, "a file's name")
        assert self.cidrs is not None  # raises InputError for what is no network

    @property
    def cidrs(self) -> Sequence[IPv4Network | IPv6Network]:
        """The networks. Raises InputError."""
        try:
            return [ip_network(text) for text in self.networks]
        except ValueError as error:
            raise InputError(f"--orchestrator: {error}; write a network like 10.0.0.0/8") from error

    @property
    def labels(self) -> dict[str, str]:
        """What all stages of this name have."""
        return {**self._common, "app.kubernetes.io/component": "stage"}

    @property
    def orchestrator_labels(self) -> dict[str, str]:
        """What lets a pod of the same namespace reach them as an orchestrator."""
        return {**self._common, "app.kubernetes.io/component": "orchestrator"}

    @property
    def _common(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "veilpipe", "app.kubernetes.io/instance": self.name}

    def stage_labels(self, stage_idx: int) -> dict[str, str]:
        """What only that stage's pod has."""
        index = {"veilpipe/stage": str(stage_idx)}
        if self.kind == "leaderworkerset":
            index = {"leaderworkerset.sigs.k8s.io/worker-index": str(stage_idx)}
        return self.labels | index

    def service(self, stage_idx: int) -> str:
        """What that stage's service is called."""
        return f"{self.name}-stage-{stage_idx}"

    def metadata(self, name: str) -> dict[str, object]:
        """Of an object of that name."""
        return {"name": name, "namespace": self.namespace, "labels": self.labels}

    def placed(self, manifest: Manifest) -> Manifest:
        """The manifest with the cluster's addresses, which its core does not have in it.

        The last stage is dialed for its results, so nobody in the cluster dials an orchestrator.
        """
        last = len(manifest.stages) - 1

        def address(stage_idx: int, port: int) -> TcpAddress:
            host = f"{self.service(stage_idx)}.{self.namespace}.svc"
            return TcpAddress(type="tcp", addr=f"{host}:{port}")

        def data_out(stage_idx: int) -> TcpAddress | VsockAddress | None:
            if stage_idx == last:
                return None
            if manifest.stages[stage_idx].expected_measurements:
                return VsockAddress(type="vsock", cid=PARENT_CID, port=ENCLAVE_OUT_PORT + stage_idx)
            return address(stage_idx + 1, DATA_PORT)

        stages = tuple(
            stage.model_copy(
                update={
                    "endpoint": StageEndpoint(
                        control=address(stage.stage_idx, CONTROL_PORT),
                        data_in=address(stage.stage_idx, DATA_PORT),
                        data_out=data_out(stage.stage_idx),
                    )
                }
            )
            for stage in manifest.stages
        )
        return manifest.model_copy(update={"stages": stages})


def selector(labels: Mapping[str, str]) -> dict[str, object]:
    """Whatever has these labels."""
    return {"matchLabels": dict(labels)}


def _check(flag: str, text: str | None, pattern: re.Pattern[str], expected: str) -> None:
    if text is not None and not pattern.fullmatch(text):
        _refuse(flag, text, expected)


def _check_image(flag: str, text: str | None) -> None:
    expected = "[HOST[:PORT]/]PATH[:TAG][@sha256:DIGEST]"
    _check(flag, text, _IMAGE, expected)
    match = _IMAGE.fullmatch(text or "")
    if match is not None and len(match["name"]) > _MAX_IMAGE_NAME:
        _refuse(flag, match["name"], f"{_MAX_IMAGE_NAME} characters at most, without the tag")


def _refuse(flag: str, text: str, expected: str) -> None:
    raise InputError(f"{flag} {text[:80]!r}: give {expected}")
