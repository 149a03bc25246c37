"""What can go wrong with the Hugging Face Hub, as typed errors of one line that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .modeling.errors import MSAError


class HubError(MSAError):
    """Base of the errors of the Hub."""


class PushRefusedError(HubError, ValueError):
    """What was to be pushed must not leave this machine as it is; nothing was sent."""


class HubTokenError(HubError):
    """No token, or one that the Hub does not know."""


class HubForbiddenError(HubError):
    """The token may not do this."""


class HubMissingError(HubError, LookupError):
    """No such repository, revision or file, or none that the token may see."""


class HubUnreachableError(HubError, ConnectionError):
    """No network, offline mode, or a Hub that does not answer."""


class HubRateLimitError(HubError):
    """Too many requests."""


@contextmanager
def translated(repository: str) -> Iterator[None]:
    """Raises the errors of huggingface_hub as those of this module; `repository` is what it is about."""
    try:
        yield
    except (MSAError, KeyboardInterrupt):
        raise
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no name of a repository: give USER/NAME") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        found = _of_chain(error, repository)
        if found is None:
            raise
        raise found from error


def _of_chain(error: BaseException | None, repository: str) -> HubError | None:
    """The first error behind another that says what is wrong: huggingface_hub wraps some of its own."""
    first, missed = error, False
    while error is not None:
        if (found := _translation(error, repository)) is not None:
            return found
        missed = missed or isinstance(error, LocalEntryNotFoundError)
        error = error.__cause__
    return _unreachable(repository, first) if missed else None


def _translation(error: BaseException, repository: str) -> HubError | None:
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError(
            f"{repository} needs the Hub, and offline mode is on: unset HF_HUB_OFFLINE, or set it to 0"
        )
    if isinstance(error, LocalTokenNotFoundError):
        return HubTokenError(_LOG_IN)
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, repository)
    if isinstance(error, HTTPError):
        return _unreachable(repository, error)
    return None


_LOG_IN = "the Hub needs a token: log in with `hf auth login`, or set HF_TOKEN"


def _of_status(error: HfHubHTTPError, repository: str) -> HubError:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())
    if status == 401 and ("Invalid credentials" in said or not isinstance(error, RepositoryNotFoundError)):
        sent = "Authorization" in error.response.request.headers
        return HubTokenError(f"the Hub does not know this token: {_LOG_IN[19:]}" if sent else _LOG_IN)
    if isinstance(error, RevisionNotFoundError):
        return HubMissingError(f"{repository} has no such revision: name a branch, tag or commit of it")
    if isinstance(error, GatedRepoError):
        return HubForbiddenError(f"{repository} is gated: ask for access on its page, then log in")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return HubMissingError(
            f"{repository} is not on the Hub, or your token may not see it: check the name, its kind and "
            "`hf auth whoami`"
        )
    if status == 403:
        return HubForbiddenError(
            f"your token may not do this with {repository}: it needs the right to write there. {said}".strip()
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        after = f" in {wait} seconds" if wait else " in a few minutes"
        return HubRateLimitError(f"the Hub takes no more requests from you now: try again{after}")
    if status >= 500:
        return HubUnreachableError(f"the Hub fails ({status}): try again later; what was uploaded is kept")
    return HubError(f"the Hub refused {repository} ({status}): {said or 'it gave no reason'}")


def _unreachable(repository: str, error: BaseException) -> HubUnreachableError:
    return HubUnreachableError(
        f"the Hub cannot be reached for {repository} ({type(error).__name__}): check the network and try "
        "again; what was uploaded is kept"
    )
