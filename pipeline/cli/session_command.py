"""The `pipeline-orch session` commands: what is kept of sessions at home."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.manifest import load_manifest
from pipeline.cli.error_reporting import EXIT_FAILURE, new_app
from pipeline.cli.kept_sessions import session_book
from pipeline.cli.logs import tell_error
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


@app.command("list")
def list_command(manifest: ManifestOption, secret_file: SecretFile) -> None:
    """List sessions by name, with the tokens of each and how many of them stages have stored."""
    is_whole = True
    for record in _book(secret_file, manifest).records():
        if isinstance(record, InputError):
            tell_error("pipeline-orch", str(record), EXIT_FAILURE)
            is_whole = False
            continue
        write_text(f"{record.name}\t{len(record.token_ids)}\t{record.num_stored}\n")
    if not is_whole:
        raise typer.Exit(EXIT_FAILURE)


@app.command("forget")
def forget_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which session.")],
    manifest: ManifestOption,
    secret_file: SecretFile,
) -> None:
    """Forget the sessions of a name, also a server's: nobody can open what stages have stored."""
    if not _book(secret_file, manifest).forget(name):
        raise InputError(f"there is no session {name!r} of this secret")


def _book(secret_file: Path, manifest: Path) -> SessionBook:
    return session_book(secret_file, load_manifest(manifest), is_made=False)
