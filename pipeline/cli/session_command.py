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
from pipeline.sessions.session_book import SessionBook

app = new_app()


@app.callback()
def sessions() -> None:
    """List and forget sessions that this machine keeps."""


SecretFile = Annotated[
    Path, typer.Option("--secret-file", metavar="FILE", help="What they are sealed under.")
]


def _book(manifest: Path, secret_file: Path) -> SessionBook:
    """Raises InputError; a secret that is not there has no sessions, and is not made for that."""
    if not secret_file.exists():
        raise InputError(f"--secret-file: there is no {secret_file}")
    return session_book(secret_file, load_manifest(manifest))


@app.command("list")
def list_command(manifest: ManifestOption, secret_file: SecretFile) -> None:
    """List sessions by name, with the tokens of each and how many of them stages have stored."""
    for record in _book(manifest, secret_file).records():
        write_text(f"{record.name}\t{len(record.token_ids)}\t{record.num_stored}\n")


@app.command("forget")
def forget_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which session.")],
    manifest: ManifestOption,
    secret_file: SecretFile,
) -> None:
    """Forget the sessions of a name, also a server's: nobody can open what stages have stored."""
    if not _book(manifest, secret_file).forget(name):
        raise InputError(f"there is no session {name!r} of this secret")
