"""The `pipeline-orch place` commands: have an engine run the stages of a manifest."""

from pipeline.cli import place_rendered
from pipeline.cli.error_reporting import new_app

app = new_app()


@app.callback()
def place() -> None:
    """Have an engine run the stages of a manifest. It is handed no key and nothing secret.

    What it says of where a stage is counts for an address: whoever answers there shows the key or
    the measurements that the manifest has, or is refused.
    """


app.command("k8s")(place_rendered.k8s_command)
app.command("slurm")(place_rendered.slurm_command)
