"""Fetching a file over HTTP: continued where it broke off, mirrors tried in turn, and never an endless wait."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import requests

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.progress import progress

ANSWER_SECONDS = 15.0  # for all mirrors together to begin to answer, name look-up included
UNREACHED = ("(cannot be reached)", "(no answer in time)")
STALL_SECONDS = 20.0  # between two pieces of a download that has begun

T = TypeVar("T")


def download(urls: list[str], path: Path, verify: Callable[[Path], object], advice: str) -> None:
    """Fetch a file from the first of several addresses that gives it.

    What has arrived is kept beside it as `.part`, and the next call asks only for the rest.

    Args:
        urls: addresses of the same file, best first.
        path: where it ends up, once whole and verified.
        verify: raises InputError where a file is not the one that was asked for; it is then deleted, and the next
            address tried.
        advice: what to do where there is no network, the end of the message.
    Raises:
        InputError: no address gave it; the message names the addresses.
    """
    part = path.with_name(path.name + ".part")
    complete = path.with_name(f"{path.stem}.unverified{path.suffix}")
    reasons = []
    if complete.exists() and not part.exists():
        complete.replace(part)  # killed while it was verified: it need not come again
    for url in urls:
        try:
            _download(url, part, path.name, ANSWER_SECONDS / len(urls))
            part.replace(complete)
            verify(complete)
            complete.replace(path)
            return
        except InputError as error:
            complete.unlink()
            reasons.append(f"{url} ({error})")
        except (requests.RequestException, TimeoutError) as error:
            reasons.append(f"{url} ({_reason(error)})")
    online = "go online, or " if any(reason.endswith(UNREACHED) for reason in reasons) else ""
    raise InputError(
        f"{path.name} is not in {path.parent} and cannot be fetched: {'; '.join(reasons)}; {online}{advice}"
    )


def _download(url: str, part: Path, description: str, answer_seconds: float) -> None:
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    response = _within(answer_seconds, lambda: _get(url, headers))
    with response:
        if response.status_code == 416:  # nothing after what is there
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return  # it is whole: killed before it got its name
            part.unlink()
            raise requests.HTTPError("the part kept here does not belong to this file; it is dropped")
        response.raise_for_status()
        if response.status_code != 206:
            start = 0  # the server sends all of it again
        declared = response.headers.get("Content-Length", "")
        if not declared.isdecimal():
            raise requests.HTTPError("the server does not say how long the file is")
        length = start + int(declared)
        with part.open("ab" if start else "wb") as stream, progress(description, length, "bytes", start) as advance:
            for piece in response.iter_content(1 << 16):
                stream.write(piece)
                advance(len(piece))
    if part.stat().st_size < length:
        raise requests.ConnectionError(
            f"broke off after {part.stat().st_size} of {length} bytes; run it again to go on"
        )


def _get(url: str, headers: dict[str, str]) -> requests.Response:
    """An answer; settings of this machine that no request can be made with are told as the request's fault."""
    try:
        return requests.get(url, headers=headers, stream=True, timeout=(10.0, STALL_SECONDS))
    except requests.RequestException:
        raise
    except (OSError, ValueError, ImportError) as error:  # no bundle of certificates, a proxy that is none
        raise requests.exceptions.InvalidProxyURL(f"this machine's settings: {error}") from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call that may hang (a name look-up has no time-out of its own) and give up on it in time."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(timeout=max(seconds, 0.001))


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError | requests.exceptions.InvalidProxyURL | requests.exceptions.InvalidSchema):
        return " ".join(str(error).split())[:160]
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted here; REQUESTS_CA_BUNDLE names a file of those that are"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy of HTTPS_PROXY refuses or cannot be reached"
    if isinstance(error, TimeoutError | requests.Timeout):
        return "no answer in time"
    if "broke off" in str(error):
        return str(error)
    return "cannot be reached"
