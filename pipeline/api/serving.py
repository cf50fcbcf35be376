"""One stage of a manifest with layers of one's own, served like any other."""

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.models.own_layers import Executor, OwnShard
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from pipeline.stage.session_admission import free_kv_bytes
from pipeline.stage.worker import StageWorker
from pipeline.stage.worker_setup import StageSetup
from transport.dial_and_listen import Endpoint, listen


async def serve_stage(
    manifest: Manifest,
    stage_idx: int,
    executor: Executor,
    trust: Trust,
    *,
    control: Endpoint | None = None,
    data_in: Endpoint | None = None,
    times: TimeLimits = DEFAULT_TIMES,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve one orchestrator after another until cancelled, at the manifest's addresses or these.

    `nursery.start` returns when it listens. Raises InputError, EndpointError.
    """
    spec, activations = manifest.stage(stage_idx), manifest.activation_spec
    shard = OwnShard(
        executor,
        range(spec.layer_start, spec.layer_end),
        manifest.total_layers,
        activations.hidden_dim,
        activations.max_seq_len,
        has_ends=not manifest.has_client_ends,
    )
    setup = StageSetup(
        manifest=manifest,
        stage_idx=stage_idx,
        shard=shard,
        trust=trust,
        precision=spec.precision or shard.precision,
        num_threads=1,
        device="cpu",
        max_kv_bytes=free_kv_bytes(shard),
        times=times,
    )
    control = control or manifest.endpoint(stage_idx).control.to_endpoint()
    data_in = data_in or manifest.endpoint(stage_idx).data_in.to_endpoint()
    with listen(control) as control_listener, listen(data_in) as data_listener:
        task_status.started()
        await StageWorker(setup).serve(control_listener, data_listener)
