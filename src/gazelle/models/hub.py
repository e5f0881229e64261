"""Uploads to the Hugging Face hub, through huggingface_hub alone: one commit a push, so all of it arrives or nothing.

Tokens go from the caller into a header and nowhere else. What the hub answers is turned into a `HubError`.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gazelle.base.errors import HubError
from gazelle.base.progress import tell
from gazelle.models.card import NAME, card_text, is_empty_form, is_untouched
from gazelle.models.record import RECORD

_WEIGHTS = re.compile(r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors")  # of a whole model
# Keys of the run's record that say where files lie on this machine, and which tokens are frequent in the data.
_PRIVATE = ("train", "eval", "profile")


def check_repository(repository: str, *, token: str | None, private: bool | None, adapter: bool | None = None,
                     revision: str | None = None) -> str:
    """Make sure of a repository that may be written to, before long work; it is made if need be.

    Args:
        repository: name, with or without the user's before it.
        token: else that of `hf auth login`.
        private: for a new repository.
        adapter: whether an adapter is to be uploaded, or a whole model; None for what may lie beside either.
        revision: that is to be written to.

    Returns:
        Its full name, with the user's before it where none was given.

    Raises:
        HubError: not to be had, with what to do; or it holds a model where an adapter is to go, or the reverse.
    """
    from huggingface_hub import HfApi

    tell(f"asking the hub for {repository}")
    api = HfApi(token=token)
    with _refusals(repository, token):
        name: str = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if adapter is not None:
            _check_kind(name, _present(api, name, revision), adapter=adapter)
    return name


def push_folder(folder: Path, repository: str, model: Any, *, token: str | None, library: str | None = None,
                revision: str | None = None, commit_message: str | None = None, commit_description: str | None = None,
                create_pr: bool = False, run_folder: Path | None = None) -> Any:
    """Upload all files in `folder`, with a card, as one commit.

    A card on the hub that somebody has edited stays. Weights of an earlier upload that are not in this one go with the
    same commit, since programs would read them first. `gazelle.json` goes without the places of data files.

    Args:
        folder: its files; it is a temporary one, whose card and record are written here.
        repository: full name, from `check_repository`.
        model: what the card is about.
        token: else that of `hf auth login`.
        library: as in `card_text`. Left out: "peft" if an adapter lies in the folder, else "transformers".
        revision, commit_message, commit_description, create_pr: as in huggingface_hub.
        run_folder: where the run's scores lie.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        HubError: the hub did not take it, or holds a model where an adapter is to go, or the reverse; then nothing is
            committed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if library is None:
        library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    record = folder / RECORD
    if record.exists():
        content = json.loads(record.read_text(encoding="utf-8"))
        if "run" in content:
            content["run"] = {key: value for key, value in content["run"].items() if key not in _PRIVATE}
        record.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    api = HfApi(token=token)
    card = folder / NAME
    with _refusals(repository, token):
        present = _present(api, repository, revision)
        keep = NAME in present and _somebodys(api, repository, revision, folder)
    if (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
        _check_kind(repository, present, adapter=(folder / "adapter_config.json").exists())
    card.unlink(missing_ok=True)
    if not keep:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        card.write_text(card_text(model, library=library, files=files, title=repository.rpartition("/")[2],
                                  run_folder=run_folder, repository=repository, token=token), encoding="utf-8")
    tell(f"uploading to {repository}")
    # upload_folder would make several commits of a large folder.
    added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path)
             for path in sorted(folder.rglob("*")) if path.is_file()]
    uploaded = {operation.path_in_repo for operation in added}
    old = [CommitOperationDelete(name) for name in sorted(present - uploaded)
           if _WEIGHTS.fullmatch(name) and any(map(_WEIGHTS.fullmatch, uploaded))]
    with _refusals(repository, token):
        return api.create_commit(repository, [*added, *old], commit_message=commit_message or "Upload model",
                                 commit_description=commit_description, revision=revision, create_pr=create_pr)


def _present(api: Any, repository: str, revision: str | None) -> set[str]:
    """The files that are in the repository already."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        return set(api.list_repo_files(repository, revision=revision))
    except (EntryNotFoundError, RevisionNotFoundError):
        return set()


def _check_kind(repository: str, present: set[str], *, adapter: bool) -> None:
    """As `save.check_target` of a folder: transformers takes an adapter before the model that lies beside it."""
    if adapter and any(map(_WEIGHTS.fullmatch, present)):
        kept = "a model"
    elif not adapter and "adapter_config.json" in present:
        kept = "an adapter"
    else:
        return
    raise HubError(f"the repository holds {kept}, and only one of the two would be loaded", where=repository,
                   found=kept, expected="a new repository, or one with what was uploaded in the same way",
                   fix="choose a repository of its own for each")


def _somebodys(api: Any, repository: str, revision: str | None, folder: Path) -> bool:
    """Whether the repository has a card that was not written here."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        text = Path(api.hf_hub_download(repository, NAME, revision=revision, local_dir=folder / ".card",
                                        force_download=True)).read_text(encoding="utf-8", errors="replace")
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    finally:
        shutil.rmtree(folder / ".card", ignore_errors=True)
    return not (is_untouched(text) or is_empty_form(text) or "# Model Card for Model ID" in text)


@contextlib.contextmanager
def _refusals(repository: str, token: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a `HubError` that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    try:
        yield
    except (httpx.HTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError, ConnectionError, TimeoutError,
            RuntimeError) as error:
        # What happens to one file of several comes wrapped in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        what, fix = "the connection to the hub broke off", "check it (behind a proxy, set HTTPS_PROXY) and try again"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            what, fix = "the hub may not be asked", "unset HF_HUB_OFFLINE"
        elif isinstance(cause, errors.LocalTokenNotFoundError):
            what, fix = "the hub wants to know who you are", "run `hf auth login`, or pass token="
        elif isinstance(cause, errors.HFValidationError):
            what, fix = "this cannot be the name of a repository", "use user/name, of letters, digits, '-', '_', '.'"
        elif isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            what, fix = _ANSWERS.get(status, ("the hub did not take it", "read what it says, and try again"))
            if status >= 500:
                what, fix = "the hub has trouble of its own", "try again later; nothing was committed"
        found = str(cause).strip() or type(cause).__name__
        if isinstance(token, str) and token:
            found = found.replace(token, "…")
        raise HubError(what, where=repository, found=found,
                       expected="a repository that takes the upload", fix=fix) from error
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        raise HubError("the hub does not take the card's metadata", where=f"{repository}, {NAME}", found=str(error),
                       expected="metadata that the hub knows",
                       fix="write a README.md of your own into the repository, which then stays") from error


_ANSWERS = {
    401: ("the hub knows no such user or token", "run `hf auth login`, or pass a valid token="),
    403: ("this token may not write there", "use a token with write access, and a repository you may write to"),
    404: ("there is no such repository, or the token may not see it", "check the name, and that the token may write"),
    409: ("somebody else wrote to the repository at the same time", "try again"),
    413: ("the hub finds it too large", "split it, for example with max_shard_size="),
    429: ("the hub was asked too often", "wait some minutes and try again"),
}

