"""The `pipeline-orch place` commands: have an engine run the stages of a manifest."""

from pipeline.cli import place_rendered
from pipeline.cli.error_reporting import new_app
from pipeline.cli.logs import configure_logging
from pipeline.cli.ray_flags import PlaceRayFlags
from pipeline.cli.settings import takes_flags

app = new_app()


@app.callback()
def place() -> None:
    """Have an engine run the stages of a manifest. It is handed no key and nothing secret.

    What it says of where a stage is counts for an address: whoever answers there shows the key or
    the measurements that the manifest has, or is refused.
    """


app.command("k8s")(place_rendered.k8s_command)
app.command("slurm")(place_rendered.slurm_command)


@app.command("ray")
@takes_flags(flags=PlaceRayFlags)
def ray_command(flags: PlaceRayFlags) -> None:
    """Have a Ray cluster run the stages until this is stopped, and write down where they are.

    Orchestrators take the written manifest as any other, and look there again when a stage is lost.
    Neither needs to trust the other: a stage is whoever its handshake shows.

    \b
        pipeline-orch place ray --manifest cluster.json --model-dir /srv/model \\
                                --output placed.json --ray-address head:6379
        pipeline-orch serve --manifest placed.json --model-dir models/smollm2
    """
    from pipeline.cli.place_ray import place_on_ray

    configure_logging(
        verbose=flags.verbose, log_format=flags.log_format, marks=flags.development.marks
    )
    place_on_ray(flags)
