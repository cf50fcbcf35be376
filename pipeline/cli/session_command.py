"""The `pipeline-orch session` commands: what is kept of sessions at home."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.manifest import load_manifest
from pipeline.cli.error_reporting import new_app
from pipeline.cli.kept_sessions import session_book
from pipeline.cli.shared_options import ManifestOption
from pipeline.cli.terminal import write_text
from pipeline.errors import InputError

app = new_app()
SecretFile = Annotated[
    Path, typer.Option("--secret-file", metavar="FILE", help="What they are sealed under.")
]


@app.command("list")
def list_command(manifest: ManifestOption, secret_file: SecretFile) -> None:
    """List sessions by name, with the tokens of each and how many of them stages have stored."""
    for record in session_book(secret_file, load_manifest(manifest)).records():
        write_text(f"{record.name}\t{len(record.token_ids)}\t{record.num_stored}\n")


@app.command("forget")
def forget_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which session.")],
    manifest: ManifestOption,
    secret_file: SecretFile,
) -> None:
    """Forget a session: what stages have stored of it can then be opened by nobody."""
    if not session_book(secret_file, load_manifest(manifest)).forget("", name):
        raise InputError(f"there is no session {name!r} of this secret")
