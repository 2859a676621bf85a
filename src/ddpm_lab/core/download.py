"""Download of a file over HTTP: continues an interrupted download, tries mirrors in turn, and limits every wait."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import requests

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.progress import progress

ANSWER_SECONDS = 15.0  # time limit for all mirrors together to begin to answer, including name look-up
STALL_SECONDS = 20.0  # time limit between two pieces of a download
UNREACHED, SILENT = "cannot be reached", "no answer in time"

T = TypeVar("T")


def download(urls: list[str], path: Path, verify: Callable[[Path], object], advice: str) -> None:
    """Download a file from the first address that provides it.

    Until it is complete, the file has the ending `.part`; the next call downloads only the rest.

    Args:
        urls: addresses of the same file, best first.
        path: where the file is put once it is complete and verified.
        verify: raises InputError if the content is wrong; the file is then deleted, and the next address tried.
        advice: what to do without a network, the end of the message.
    Raises:
        InputError: no address provided the file; the message names each address with the reason.
    """
    part = path.with_name(path.name + ".part")
    complete = path.with_name(f"{path.stem}.unverified{path.suffix}")
    reasons = {}
    if complete.exists() and not part.exists():
        complete.replace(part)  # the process was killed while it verified the file
    for url in urls:
        try:
            _download(url, part, path.name, ANSWER_SECONDS / len(urls))
            part.replace(complete)
            verify(complete)
            complete.replace(path)
            return
        except InputError as error:
            complete.unlink(missing_ok=True)
            reasons[url] = str(error)
        except (requests.RequestException, TimeoutError) as error:
            reasons[url] = _reason(error)
    online = "go online, or " if {UNREACHED, SILENT} & set(reasons.values()) else ""
    listed = "; ".join(f"{url} ({reason})" for url, reason in reasons.items())
    raise InputError(f"{path.name} is not in {path.parent} and cannot be downloaded: {listed}; {online}{advice}")


def _download(url: str, part: Path, description: str, answer_seconds: float) -> None:
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with within(answer_seconds, lambda: _get(url, headers)) as response:
        if response.status_code == 416:  # nothing after what is there
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return  # the file is complete: the process was killed before it renamed the file
            part.unlink()
            raise requests.HTTPError("the partial download kept here does not belong to this file and was deleted")
        response.raise_for_status()
        if response.status_code != 206:
            start = 0  # the server sends the whole file again
        declared = response.headers.get("Content-Length", "")
        if not declared.isdecimal():
            raise requests.HTTPError("the server does not send the length of the file")
        length = start + int(declared)
        with part.open("ab" if start else "wb") as stream, progress(description, length, "bytes", start) as advance:
            for piece in response.iter_content(1 << 16):
                stream.write(piece)
                advance(len(piece))
    size = part.stat().st_size
    if size < length:
        raise requests.HTTPError(f"broke off after {size} of {length} bytes; run it again to continue")


def _get(url: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(url, headers=headers, stream=True, timeout=(10.0, STALL_SECONDS))
    except requests.RequestException:
        raise
    except (OSError, ValueError, ImportError) as error:  # no certificate bundle, or an invalid proxy
        raise InputError(f"this machine's settings: {error}") from error


def within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call in a thread, and stop waiting for it after some seconds (a name look-up has no time limit)."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(timeout=seconds)


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError | requests.exceptions.InvalidProxyURL | requests.exceptions.InvalidSchema):
        return " ".join(str(error).split())[:160]
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted here; REQUESTS_CA_BUNDLE names a file of trusted certificates"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy of HTTPS_PROXY refuses or cannot be reached"
    return SILENT if isinstance(error, TimeoutError | requests.Timeout) else UNREACHED
