"""Fetches the files of a model from the Hugging Face hub, with huggingface_hub.

The cache (HF_HOME), progress bars, token (HF_TOKEN, `hf auth login`), endpoint (HF_ENDPOINT) and offline mode
(HF_HUB_OFFLINE) are those of huggingface_hub.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.common.errors import LoadError, MissingExtraError
from surgery.common.readers import first_line

# A revision is a part of a path in the cache, so it must not leave it.
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,200}")

_PATIENCE = 10.0  # seconds, as huggingface_hub waits for the facts of a file

# Names in a repository -> the files to fetch. Raises LoadError if the repository lacks what is needed.
Choose = Callable[[Iterable[str]], list[str]]


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit, in the cache.

    Attributes:
        folder: Directory of the files.
        repo: Name of the repository.
        commit: Commit hash.
        note: Sentence for the user if the hub could not be asked for the newest commit, else "".
    """

    folder: Path
    repo: str
    commit: str
    note: str = ""


def split_revision(ref: str, name: str) -> tuple[str, str | None]:
    """Split `ORG/NAME@REVISION` into the name and the revision, None if there is none.

    Args:
        ref: The reference, for messages.
        name: The reference without its scheme.

    Raises:
        LoadError: The revision cannot be the name of a branch, a tag or a commit.
    """
    repo, at, revision = name.partition("@")
    if at:
        check_revision(ref, revision)
    return repo, revision if at else None


def check_revision(where: str, revision: str) -> None:
    """Raise LoadError if a text cannot be the name of a branch, a tag or a commit."""
    if not _REVISION.fullmatch(revision) or ".." in revision or revision.endswith("/"):
        raise LoadError(f"{where}: {revision[:80]!r} is no revision; write a branch, a tag or a commit hash")


def require_hub() -> Any:
    """The module huggingface_hub. Raises MissingExtraError if it is not installed."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        if error.name == "huggingface_hub":
            raise MissingExtraError("huggingface_hub", "hub") from None
        raise LoadError(f"huggingface_hub is installed but cannot be imported: {error}") from error
    return huggingface_hub


def check_repo(where: str, repo: str) -> None:
    """Raise LoadError if a text cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise LoadError(
            f"{where}: {repo[:120]!r} is neither a directory nor a name on the hub; write ORG/NAME, or the path of a "
            "directory"
        ) from None


def fetch(ref: str, repo: str, revision: str | None, choose: Choose, remedy: str = "") -> Snapshot:
    """Fetch files of a repository into the cache, or find them there if the hub cannot be asked.

    Args:
        ref: The reference, for messages.
        repo: Name of the repository.
        revision: Branch, tag or commit hash; None for the main branch.
        choose: Function that chooses from the names of the files.
        remedy: Clause for the message of a hub that cannot be reached: what to do without it.

    Returns:
        The files at one commit; `choose` of the names there exist.

    Raises:
        LoadError: The repository, the revision or its files cannot be had. No half file is ever used.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = require_hub()
    check_repo(ref, repo)
    try:
        info = hub.HfApi().model_info(repo, revision=revision, timeout=_PATIENCE)
    except Exception as error:
        found = None if _is_final(error) else _cached(hub, ref, repo, revision, choose, error)
        if found is not None:
            return found
        reason = why_not(error, repo, revision)
        if _is_unreachable(error):
            reason = f"{repo} is not in the local cache, and {reason}"
            reason += f"; {remedy or 'go online once, or name a directory'}"
        raise LoadError(f"{ref}: {reason}") from error
    wanted = choose([file.rfilename for file in info.siblings or ()])
    try:
        with bars():
            folder = Path(
                hub.snapshot_download(
                    repo, revision=revision, allow_patterns=[glob.escape(name) for name in wanted]
                )
            )
    except Exception as error:
        known = why_not(error, repo, revision, default="")
        raise LoadError(
            f"{ref}: {known or f'the download broke off ({first_line(error)}); run it again; no half file is used'}"
        ) from error
    lacking = [name for name in wanted if not (folder / name).is_file()]
    if lacking:
        raise LoadError(
            f"{ref}: {repo} changed while it was fetched and lacks {lacking[0]} now; run it again"
        )
    return Snapshot(folder, repo, folder.name)


@contextmanager
def bars() -> Iterator[None]:
    """Show the progress bars of huggingface_hub in a terminal, and none in a pipe, unless the user asks for them."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    quiet = shown and not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    if quiet:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            utils.enable_progress_bars()


def _cached(
    hub: Any, ref: str, repo: str, revision: str | None, choose: Choose, error: Exception
) -> Snapshot | None:
    """The files in the cache, or None if it has no commit for the revision.

    Raises:
        LoadError: The cache has only a part of the files.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = hub.snapshot_download(repo, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as missing:
        # Only the chosen files are fetched, so a snapshot of ours is incomplete for huggingface_hub.
        folder = getattr(missing, "snapshot_path", None)
    if folder is None or not Path(folder).is_dir():
        return None
    folder = Path(folder)
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    listed = _listed(hub, repo, folder.name)
    try:
        wanted = choose(there if listed is None else listed)
        lacking = next((name for name in wanted if name not in there), "")
    except LoadError:
        if listed is not None:
            raise
        lacking = "its weights"
    if lacking:
        raise LoadError(
            f"{ref}: the copy of {repo} in the local cache is incomplete, it lacks {lacking}, and "
            f"{why_not(error, repo, revision)}; go online once"
        )
    offline = isinstance(error, OfflineModeIsEnabled)
    note = "" if offline else f"{why_not(error, repo, revision)}; the copy in the local cache is used"
    return Snapshot(folder, repo, folder.name, note)


def _listed(hub: Any, repo: str, commit: str) -> list[str] | None:
    """Names of all files of a commit, if the cache has their list."""
    try:
        return [file.path for file in hub.get_cached_repo_tree(repo, revision=commit)]
    except Exception:  # an earlier version of huggingface_hub, or files that something else fetched
        return None


def _is_final(error: Exception) -> bool:
    """True if the hub has answered that there is no such revision: what the cache holds is another one."""
    from huggingface_hub.errors import RevisionNotFoundError

    return isinstance(error, RevisionNotFoundError)


def _is_unreachable(error: Exception) -> bool:
    """True if the hub did not answer, or not as a hub does."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500


def why_not(
    error: Exception, repo: str, revision: str | None = None, default: str = "the hub cannot be reached"
) -> str:
    """Reason of a failed request as a clause with a remedy.

    Args:
        error: The exception of huggingface_hub.
        repo: Name of the repository.
        revision: Revision that was asked for.
        default: Clause for any other error.
    """
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; ask for access on its page, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no model {repo} on the hub, or it is private; check the name, or {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; name another branch, tag or commit"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub refuses the token for {repo}; {login}"
        return f"the hub answers with the status {status}"
    return default
