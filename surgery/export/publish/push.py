"""Uploads a directory that surgery wrote to the Hugging Face hub, in one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.capture.hub import bars, check_repo, check_revision, require_hub, why_not
from surgery.common.errors import ExportError, SurgeryError
from surgery.common.readers import first_line
from surgery.export.publish.artifact import CARD, Artifact, read_artifact
from surgery.export.publish.card import MARK, write_card


@dataclass(frozen=True)
class Pushed:
    """An upload.

    Attributes:
        url: Address of the repository, or of the branch.
        commit: Commit hash.
        files: Names of the files that were uploaded.
        left_out: Names of files in the directory that were not.
        card: "written", or the reason why no card was written.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    card: str


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    license_: str | None = None,
    overwrite_card: bool = False,
) -> Pushed:
    """Upload a directory in the format of transformers, PEFT or ONNX, with a model card.

    Args:
        folder: The directory.
        repo: Name of the repository, which is created if it does not exist.
        private: Create the repository as a private one.
        revision: Branch to commit to, which is created if it does not exist; None for the main branch.
        token: Token for the hub; None for the one of huggingface_hub.
        license_: Identifier of the license for the card; None for that of the base, if the hub knows it.
        overwrite_card: Replace a card that somebody else wrote.

    Raises:
        ExportError: The directory is not of surgery, holds what must not be uploaded, or the hub refuses.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = require_hub()
    check_repo("push", repo)
    if "/" not in repo:
        raise ExportError(f"push: {repo!r} names no owner; write ORG/NAME")
    if revision is not None:
        check_revision("push", revision)
    artifact = read_artifact(Path(folder))
    api = hub.HfApi(token=token)
    try:
        return _upload(hub, api, artifact, repo, private, revision, license_, overwrite_card)
    except SurgeryError:
        raise
    except Exception as error:
        reason = why_not(error, repo, revision, default="")
        raise ExportError(
            f"push: {reason or f'the upload broke off ({first_line(error)}); run it again'}; nothing was committed"
        ) from error


def _upload(
    hub: Any,
    api: Any,
    artifact: Artifact,
    repo: str,
    private: bool,
    revision: str | None,
    license_: str | None,
    overwrite_card: bool,
) -> Pushed:
    """Create what is missing and commit the files. Exceptions of huggingface_hub pass through."""
    address = api.create_repo(repo, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    files: dict[str, Any] = {name: artifact.folder / name for name in artifact.files if name != CARD}
    card, kept = _card(hub, api, artifact, repo, revision, license_, overwrite_card)
    if card is not None:
        files[CARD] = card.encode()
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
    ]
    with bars():
        done = api.create_commit(
            repo, operations, commit_message=f"Upload {artifact.format} model with surgery", revision=revision
        )
    url = str(address) if revision is None else f"{address}/tree/{revision}"
    return Pushed(url, str(done.oid), tuple(files), artifact.left_out, kept or "written")


def _card(
    hub: Any,
    api: Any,
    artifact: Artifact,
    repo: str,
    revision: str | None,
    license_: str | None,
    overwrite_card: bool,
) -> tuple[str | None, str]:
    """The card to commit, None to keep the one that is there; and the reason why ours is not written, or ""."""
    if CARD in artifact.files and not overwrite_card:
        text = (artifact.folder / CARD).read_text(encoding="utf-8")
        if MARK not in text:
            return text, f"{CARD} of the directory is used; --overwrite-card replaces it"
    if not overwrite_card and not _is_ours(hub, api, repo, revision):
        return (
            None,
            f"{CARD} of the repository is kept, since surgery did not write it; --overwrite-card replaces it",
        )
    return write_card(artifact, repo, license_ or _license_of(api, artifact)), ""


def _is_ours(hub: Any, api: Any, repo: str, revision: str | None) -> bool:
    """True if the repository has no card, or one that was written here."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = api.hf_hub_download(repo, CARD, revision=revision)
    except LocalEntryNotFoundError:
        raise  # the hub did not answer
    except EntryNotFoundError:
        return True
    return MARK in Path(path).read_text(encoding="utf-8")


def _license_of(api: Any, artifact: Artifact) -> str | None:
    """License of the base, if it is on the hub and says so. A base that cannot be read there is no fault."""
    if not artifact.base.repo:
        return None
    try:
        info = api.model_info(artifact.base.repo)
    except Exception:  # no access to the base any more: the card then names no license
        return None
    found = getattr(info.card_data, "license", None)
    return found if isinstance(found, str) else None
