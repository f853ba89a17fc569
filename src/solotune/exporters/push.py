"""Upload an exported folder to a model repository on the hub, by huggingface_hub. Only `--push` does this.

    url = push(folder, "owner/name")         a new private repository, or an empty one

The token is huggingface_hub's (`hf auth login`, HF_TOKEN): it is not read here and stands in no record. The folder
has to be as the export wrote it, by its manifest, and a repository that has files is refused: what somebody else may
be loading is never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from solotune.config.run_config import Choice
from solotune.errors import InputError, IntegrityError, program
from solotune.exporters.artifact import Export
from solotune.exporters.export_folder import ExportFolder
from solotune.hub.download import HUB_ID, offline_switch
from solotune.run.manifest import check_folder
from solotune.units import first_line

PUSHED = ("adapter", "merged", "gguf", "ollama", "adapter-gguf")
MADE_BY_THE_HUB = {".gitattributes"}
CODE = (".bin", ".pt", ".pth", ".pkl", ".py")  # formats that can run code


def push(folder: Path, repo: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Upload a folder; returns the address of the commit.

    Args:
        repo: `owner/name`.
        private: who may read the repository; one that exists is left as it is.
        endpoint: the hub's address; None: huggingface_hub's.

    Raises:
        InputError: no such name, no permission, no network, or a repository that has files.
        IntegrityError: the folder is not as the export wrote it.
    """
    from httpx import TransportError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    _check(folder, repo)
    api = HfApi(endpoint=endpoint, library_name="solotune")
    try:
        if not _create(api, repo, private):
            present = sorted(set(api.list_repo_files(repo)) - MADE_BY_THE_HUB)
            if present:
                raise _refused(
                    repo, f"it has files: {', '.join(present[:5])}", "a new or an empty repository", "another name"
                )
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{folder.name}, by solotune")
    except LocalTokenNotFoundError:
        raise _refused(repo, "no token", "a token that may write", _LOG_IN) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        change = _LOG_IN if status in (401, 403) else "try again later, or upload the folder by hand"
        raise _refused(repo, first_line(error), "a repository that your token may write", change) from None
    except OfflineModeIsEnabled:
        raise _refused(repo, f"HF_HUB_OFFLINE={offline_switch()}", "a hub that answers", "unset it") from None
    except TransportError as error:
        seen = first_line(error, with_type=True)
        raise _refused(repo, seen, "a hub that answers", "run it where the hub can be reached") from None
    return str(done.commit_url)


def exported(folder: Path, kinds: Sequence[str], repo: str) -> Export | None:
    """What an earlier export has recorded of the one kind to upload; None if it is not there yet.

    Raises:
        InputError: not one kind of files, or no name of a repository.
    """
    if len(kinds) != 1 or kinds[0] not in PUSHED:
        seen, allowed = f"--to {','.join(kinds)}", f"one of {', '.join(PUSHED)}"
        raise _refused(repo, seen, allowed, "name the one to upload with --to, such as --to merged")
    _check_name(repo)
    if not (folder / kinds[0]).exists():
        return None
    records = [one for one in ExportFolder(folder, None).earlier() if one.get("kind") == kinds[0]]
    problems = [str(problem) for one in records for problem in one.get("problems", ())]
    if problems or not records:
        seen = "; ".join(problems) or "export.json does not list it"
        raise _refused(repo, seen, "an export that holds", f"remove {folder / kinds[0]}, and export again")
    choice = Choice("export", "the one that is there", f"{folder / kinds[0]} was compared when it was written")
    return Export(folder, [], [choice])


_LOG_IN = "log in with: hf auth login (a token that may write), or set HF_TOKEN"


def _refused(repo: str, seen: str, allowed: str, change: str) -> InputError:
    return InputError(f"--push {repo}: nothing was uploaded", seen=seen, allowed=allowed, change=change)


def _check(folder: Path, repo: str) -> None:
    """Raises:
    InputError: no name of a repository, or files that can run code.
    IntegrityError: the folder has changed.
    """
    _check_name(repo)
    for file, problem in check_folder(folder):
        change = f"export again; {program()} verify compares a run's files"
        raise IntegrityError(f"{folder / file}: {problem}", change=change)
    if code := [path.name for path in sorted(folder.rglob("*")) if path.suffix in CODE]:
        raise _refused(repo, ", ".join(code), "safetensors, GGUF, JSON and texts", "remove it")


def _check_name(repo: str) -> None:
    if not HUB_ID.fullmatch(repo) or "/" not in repo:
        raise _refused(repo, repo, "owner/name", "such as --push my-name/my-model")


def _create(api: object, repo: str, private: bool) -> bool:
    """Create the repository; False if it exists."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(api, HfApi)
    try:
        api.create_repo(repo, private=private)
        return True
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
        return False
