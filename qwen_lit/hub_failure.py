"""Why a model could not be had from a hub, and what to do, in one line."""

import urllib.request
from typing import Any
from urllib.parse import urlsplit

from qwen_lit.errors import shortened
from qwen_lit.hub_libraries import HuggingFace, ModelScope


def unreached(source: HuggingFace | ModelScope, name: str, error: BaseException, begun: bool = False) -> str:
    """One line on why a model could not be had, with what to do.

    Args:
        source: the hub.
        name: of the model.
        error: of its library.
        begun: whether the hub has answered before.
    """
    where, status = source.endpoint, _status(error)
    kinds = {type(one).__name__ for one in _chain(error)}
    login = f"log in with {source.login}"
    if "GatedRepoError" in kinds or status == 403:
        gated = f"{name} is gated on {where}, or not for this account"
        return f"{gated}: accept its terms at {where}/{name}, then {login}."
    if "RepositoryNotFoundError" in kinds or status == 404:
        return f"there is no {name} on {where}, or it is private: check the name, or {login}."
    if status == 401:
        return f"{where} does not accept the login for {name}: {login} again."
    reason = f"HTTP {status}" if status else _reason(error)
    proxy = urllib.request.getproxies().get(urlsplit(where).scheme)
    if proxy and not status:
        # Without the user and the password that it may hold.
        reason += f", through the proxy {urlsplit(proxy).hostname or proxy}"
    if begun:
        retry = "files that are whole stay: run the command again"
        return f"fetching {name} from {where} was interrupted ({reason}); {retry}, or {_remedies(source, name)}"
    return f"{name} cannot be fetched from {where} ({reason}); {_remedies(source, name)}"


def _remedies(source: HuggingFace | ModelScope, name: str) -> str:
    other = "set HF_ENDPOINT=https://hf-mirror.com, or --model.hub modelscope"
    offline = "; HF_HUB_OFFLINE=1 asks no hub"
    if isinstance(source, ModelScope):
        other, offline = "set --model.hub huggingface, with HF_ENDPOINT=https://hf-mirror.com where that is nearer", ""
    commands = f"hf download {name} --local-dir DIR, or modelscope download --model {name} --local_dir DIR, makes one"
    return f"{other}, or give a folder as --model.model_name_or_path: {commands}{offline}."


def _chain(error: BaseException | None) -> list[Any]:
    """The error with those that it came from, the files' of ModelScope as well."""
    found: list[Any] = []
    while error is not None and error not in found:
        found.append(error)
        files = getattr(error, "failed_files", None)
        error = error.__cause__ or error.__context__ or (next(iter(files.values())) if files else None)
    return found


def _status(error: BaseException) -> int | None:
    """The HTTP status that it came from."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None) or getattr(one, "status_code", None)
        if isinstance(status, int) and status >= 400:
            return status
    return None


def _reason(error: BaseException) -> str:
    """The innermost reason, without the library's words around it."""
    inner = _chain(error)[-1]
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return shortened(" ".join(str(text).split()))
