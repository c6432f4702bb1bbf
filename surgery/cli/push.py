"""The command push, which uploads to the hub."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to (default: main).")
@click.option("--token", help="Token for the hub (default: HF_TOKEN, or that of `hf auth login`).")
@click.option("--license", "license_", metavar="ID", help="License for the card (default: that of the base).")
@click.option("--overwrite-card", is_flag=True, help="Replace a README.md that surgery did not write.")
def push(
    directory: Path,
    repository: str,
    private: bool,
    revision: str | None,
    token: str | None,
    license_: str | None,
    overwrite_card: bool,
) -> None:
    """Upload what merge --format hf, export-peft or export wrote to the hub, with a model card.

    The card says what was done, from the journal. Only files that surgery writes are uploaded, and never a pickle.
    """
    from surgery.cli.render import console
    from surgery.export.publish.push import push as upload

    done = upload(
        directory,
        repository,
        private=private,
        revision=revision,
        token=token,
        license_=license_,
        overwrite_card=overwrite_card,
    )
    out = console()
    if done.left_out:
        out.print(f"left out: {', '.join(done.left_out)}", markup=False)
    if done.card != "written":
        out.print(done.card, markup=False)
    out.print(f"uploaded {len(done.files)} files in commit {done.commit[:12]}", markup=False)
    click.echo(done.url)
