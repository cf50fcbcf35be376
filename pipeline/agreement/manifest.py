"""The manifest: which layers run where, what must run there, and what everybody has to agree on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_validator

from pipeline.agreement.addresses import Address, StageEndpoint, Strict, check_targets
from pipeline.agreement.pieces_spec import FileName, PiecesSpec
from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.registry import make_codec
from pipeline.dtypes import Precision
from pipeline.errors import InputError, ManifestError

CORE_DOMAIN = b"veilpipe-manifest-core/1\n"
# A manifest of 256 stages is about 256 KiB, weights in many files a few times that.
MAX_MANIFEST_BYTES = 4 << 20
# As many as control messages and step headers can name.
MAX_STAGES = 256
# Who holds embedding, final norm and head: the first and last stage, or the orchestrator.
Split = Literal["stages", "client"]


def _pcr_index(key: object) -> object:
    """JSON keys are text, and "00" next to "0" would leave open which measurement counts."""
    if not isinstance(key, str):
        return key
    if not (key.isascii() and key.isdigit() and len(key) <= 2 and str(int(key)) == key):
        raise ValueError("a PCR is named by a decimal number, 0 to 31, without leading zeros")
    return int(key)


Sha256Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]
KeyHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]
PcrHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{96}$", to_lower=True)]
PcrIndex = Annotated[int, Field(ge=0, le=31), BeforeValidator(_pcr_index)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]


class ActivationSpec(Strict):
    """What travels between stages: [tokens, hidden_dim] in the wire format of the codec `dtype`."""

    dtype: str
    hidden_dim: Annotated[int, Field(ge=1, le=1 << 20)]
    max_seq_len: Annotated[int, Field(ge=1, le=1 << 24)]

    @model_validator(mode="after")
    def _has_a_codec(self) -> Self:
        assert self.codec  # raises ValueError where there is none
        return self

    @property
    def codec(self) -> ActivationCodec:
        """What makes them of a stage's rows, and rows of them."""
        return make_codec(self.dtype, self.hidden_dim)


class StageSpec(Strict):
    """One stage: layers `layer_start` (inclusive) to `layer_end` (exclusive)."""

    stage_idx: int
    layer_start: Annotated[int, Field(ge=0)]
    layer_end: Annotated[int, Field(ge=1)]
    weight_hashes: tuple[Sha256Hex, ...] = ()
    require_weight_hashes: bool = False
    precision: Precision | None = None  # of the weights in memory; None: the stage decides
    # What it computes with: another level rounds differently. None: the stage decides.
    kernels: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    # Of keys and values, of all its requests together. None: what is free.
    kv_bytes: Annotated[int, Field(ge=1, le=1 << 50)] | None = None
    # Machines that may run it, known by these keys and attested by nobody.
    machine_keys: tuple[KeyHex, ...] = ()
    expected_measurements: dict[PcrIndex, PcrHex] = Field(default_factory=dict)
    endpoint: StageEndpoint | None = None

    @model_validator(mode="after")
    def _has_the_hashes_it_requires(self) -> Self:
        if self.require_weight_hashes and not self.weight_hashes:
            raise ValueError(
                "require_weight_hashes is true and there are no weight_hashes; "
                "`pipeline-orch plan` writes them"
            )
        return self

    @model_validator(mode="after")
    def _is_known_by_one_thing(self) -> Self:
        # Attack: measurements that are not looked at, since a key would do as well.
        if self.machine_keys and self.expected_measurements:
            raise ValueError(
                "a stage is known by machine_keys or by expected_measurements, not by both"
            )
        return self

    def measurements(self) -> dict[int, bytes]:
        """PCR index to the 48 bytes this stage must show."""
        return {index: bytes.fromhex(value) for index, value in self.expected_measurements.items()}


class ClientSpec(Strict):
    """The orchestrator's own part where `split` is client: embedding, final norm and head."""

    weight_hashes: Annotated[tuple[Sha256Hex, ...], Field(min_length=1)]
    precision: Precision | None = None  # of the weights in memory; None: the orchestrator decides


class PartSpec(Strict):
    """A worker that nobody trusts, which the one stage asks for part of all layers' work."""

    kind: Literal["attention", "linear", "mixed-linear"]
    public_key: KeyHex | None = None  # None: in development only
    address: Address | None = None


class EncodingSpec(Strict):
    """What keys and values that lie encoded get beside secret keys and orders."""

    # The scale of noise in columns of its own.
    noise: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    # Rows of other text in each layer of each text; with an attention worker.
    num_decoys: Annotated[int, Field(ge=0, le=4096)] = 0
    # Whether each step's rows get keys of their own.
    is_one_time: bool = False


class HomeStages(Strict):
    """Stages on machines of the user's own, before and behind those that are not."""

    first: Annotated[int, Field(ge=1)]
    last: Annotated[int, Field(ge=1)]


class DpSpec(Strict):
    """Noise on every row that leaves an orchestrator that holds the ends."""

    sigma: Annotated[float, Field(ge=1e-9, le=1e9)]
    # The L2 norm that rows are clipped to first.
    clip: Annotated[float, Field(ge=1e-9, le=1e9)]


class Manifest(Strict):
    """What every party loads; `core_hash` is what they must have in common to talk at all."""

    model_name: str
    model_version: str
    total_layers: Annotated[int, Field(ge=1, le=4096)]
    stages: Annotated[tuple[StageSpec, ...], Field(max_length=MAX_STAGES)]
    activation_spec: ActivationSpec
    config_hash: Sha256Hex | None = None
    eos_token_ids: tuple[TokenId, ...] = ()
    orchestrator_keys: tuple[KeyHex, ...] = ()
    split: Split = "stages"
    client: ClientSpec | None = None
    # Of files that are hashed in pieces, too: by the hash of the whole.
    weight_pieces: dict[FileName, PiecesSpec] = Field(default_factory=dict)
    # Fingerprint of the secret rotation that all weights have in them; None: they are plain.
    rotation: Sha256Hex | None = None
    dp: DpSpec | None = None
    part: PartSpec | None = None
    # How many stages at both ends are at home; those between keep keys and values encoded.
    home_stages: HomeStages | None = None
    # How keys and values lie encoded; None: by one secret for each text.
    encoding: EncodingSpec | None = None

    @property
    def encoded_stages(self) -> range:
        """The stages that keep keys and values encoded, with keys that they are handed."""
        home = self.home_stages
        return range(home.first, len(self.stages) - home.last) if home is not None else range(0)

    @property
    def has_client_ends(self) -> bool:
        """Whether the orchestrator holds embedding and head, so that stages hold layers only."""
        return self.split == "client"

    @property
    def is_keyed(self) -> bool:
        """Whether any stage, or a part, is known by its machine's key and attested by nobody."""
        is_part_keyed = self.part is not None and self.part.public_key is not None
        return is_part_keyed or any(stage.machine_keys for stage in self.stages)

    @model_validator(mode="after")
    def _a_client_has_its_part(self) -> Self:
        if self.has_client_ends and self.client is None:
            raise ValueError(
                "split is client, and no client.weight_hashes pin its embedding and head; "
                "`pipeline-orch plan --split client` writes them"
            )
        if self.client is not None and not self.has_client_ends:
            raise ValueError("client is for manifests whose split is client")
        if self.rotation is not None and not self.has_client_ends:
            raise ValueError("rotation is for manifests whose split is client")
        if self.dp is not None and not self.has_client_ends:
            raise ValueError("dp is for manifests whose split is client")
        return self

    @model_validator(mode="after")
    def _one_stage_asks_for_a_part(self) -> Self:
        if self.part is not None and (len(self.stages) != 1 or self.has_client_ends):
            raise ValueError("part is for manifests of one stage with embedding and head")
        if self.home_stages is not None and (not self.encoded_stages or self.has_client_ends):
            raise ValueError("home_stages are stages with embedding and head, and leave others")
        return self

    @model_validator(mode="after")
    def _something_is_encoded(self) -> Self:
        is_held = self.part is not None and self.part.kind == "attention"
        if self.encoding is not None and not is_held and self.home_stages is None:
            raise ValueError("encoding is for manifests whose keys and values lie encoded")
        if self.encoding is not None and self.encoding.num_decoys and not is_held:
            raise ValueError(
                "encoding.num_decoys: decoys are read from the first layer on, and stages between "
                "two at home have others"
            )
        return self

    @model_validator(mode="after")
    def _stages_cover_the_model(self) -> Self:
        if not self.stages:
            raise ValueError("stages is empty; a pipeline needs at least one stage")
        check_targets([stage.endpoint for stage in self.stages])
        expected_start = 0
        for position, stage in enumerate(self.stages):
            where = f"stages[{position}]"
            if stage.stage_idx != position:
                raise ValueError(f"{where} has stage_idx {stage.stage_idx}, expected {position}")
            if stage.layer_end <= stage.layer_start:
                raise ValueError(
                    f"{where} covers no layer ({stage.layer_start} to {stage.layer_end})"
                )
            if stage.layer_start != expected_start:
                kind = "gap" if stage.layer_start > expected_start else "overlap"
                raise ValueError(
                    f"{kind}: {where} starts at layer {stage.layer_start}, "
                    f"expected {expected_start}"
                )
            expected_start = stage.layer_end
        if expected_start != self.total_layers:
            raise ValueError(
                f"expected {self.total_layers} layers, the stages cover {expected_start}"
            )
        return self

    def core(self) -> dict[str, Any]:
        """Everything but addresses and measurements: what an image can carry of itself."""
        whole = _without_new_defaults(self.model_dump(mode="json"))
        for stage in whole["stages"]:
            del stage["endpoint"], stage["expected_measurements"]
        if whole.get("part") is not None:
            del whole["part"]["address"]
        return whole

    def core_hash(self) -> bytes:
        """SHA-256 of the canonical core; every channel binds it."""
        canonical = json.dumps(
            self.core(), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        return hashlib.sha256(CORE_DOMAIN + canonical.encode()).digest()

    def stage(self, stage_idx: int) -> StageSpec:
        """The stage of that index; raises ManifestError when there is none."""
        if not 0 <= stage_idx < len(self.stages):
            raise ManifestError(
                f"stage index {stage_idx} is out of range; the manifest has stages 0 to "
                f"{len(self.stages) - 1}"
            )
        return self.stages[stage_idx]

    def endpoint(self, stage_idx: int) -> StageEndpoint:
        """That stage's addresses; raises ManifestError when the manifest is only a core."""
        endpoint = self.stage(stage_idx).endpoint
        if endpoint is None:
            raise ManifestError(f"stage {stage_idx} has no endpoint in this manifest; add one")
        return endpoint


def check_precision(name: str) -> Precision:
    """A precision given as a flag; raises InputError listing those there are."""
    known = get_args(Precision)
    if name not in known:
        raise InputError(f"--dtype {name}: use {', '.join(known)}")
    return cast(Precision, name)


def check_split(name: str) -> Split:
    """A split given as a flag; raises InputError listing those there are."""
    known = get_args(Split)
    if name not in known:
        raise InputError(f"--split {name}: use {', '.join(known)}")
    return cast(Split, name)


def parse_manifest(text: str | bytes, source: str = "manifest") -> Manifest:
    """Decode and check a manifest. Raises ManifestError naming the field and the value."""
    try:
        json.loads(text, object_pairs_hook=_unique)
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ManifestError(f"{source}: {_first_problem(error)}") from error
    except _DuplicateKey as error:
        raise ManifestError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source}: not JSON ({error})") from error


def build_manifest(fields: Mapping[str, Any], source: str) -> Manifest:
    """A manifest from plain values, judged as one that is read. Raises ManifestError."""
    return parse_manifest(json.dumps(fields), source)


def load_manifest(path: Path) -> Manifest:
    """Read a manifest file. Raises ManifestError, one line."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(
            f"cannot read manifest {path}: {error.strerror}; "
            "`pipeline-orch plan` or `join` writes one, and manifests/ holds examples"
        ) from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"manifest {path} is over {MAX_MANIFEST_BYTES} bytes")
    return parse_manifest(text, str(path))


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as indented JSON, for people."""
    whole = _without_new_defaults(manifest.model_dump(mode="json", exclude_none=True))
    return json.dumps(whole, indent=2) + "\n"


def _without_new_defaults(whole: dict[str, Any]) -> dict[str, Any]:
    """Manifests of plain stages that hold everything keep the core they had before any choice."""
    if whole["split"] == "stages":
        del whole["split"]
        whole.pop("client", None)
    for name in ("rotation", "dp", "part", "home_stages", "encoding", "weight_pieces"):
        if not whole.get(name):
            whole.pop(name, None)
    for stage in whole["stages"]:
        for name in ("kernels", "kv_bytes", "machine_keys"):
            if not stage.get(name):
                stage.pop(name, None)
    return whole


class _DuplicateKey(Exception):
    """A name given twice, where readers differ in which one they take."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKey(f"field {twice[:80]!r} is given twice")
    return found


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"not JSON ({message.removeprefix('Invalid JSON: ')})"
    if problem["type"] == "extra_forbidden":
        return f"unknown field {where!r}; remove it or correct its name"
    shown = ""
    if isinstance(problem["input"], str | int | float) or problem["input"] is None:
        shown = f", got {str(problem['input'])[:80]!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where + ': ' if where else ''}{message}{shown}{more}"
