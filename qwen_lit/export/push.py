"""Upload of an exported folder to the hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qwen_lit.errors import RunError, UserError


def check_repository(name: str) -> None:
    """Reject a name that no repository can have, before anything is done.

    Raises:
        UserError: it is one.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push_to_hub: {name!r} is not a repository's name; give NAME/MODEL.") from error


def push(folder: Path, name: str) -> None:
    """Upload a folder; the repository is made where there is none.

    Raises:
        RunError: the hub does not take it, or is not reached.
    """
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # of the network, the login, the card, the quota: each library has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"push_to_hub: {name} was not uploaded ({reason}); {folder} is whole: log in with hf auth login, and push "
            "again."
        ) from error
