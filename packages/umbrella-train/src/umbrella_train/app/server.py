"""The HTTP server of the page: only requests to 127.0.0.1 with the random token in their path are answered.

The token is in the path and not in a cookie: a browser sends cookies of 127.0.0.1 to the servers on all of its ports,
which may be other people's.

    POST   TOKEN/scan?modality=T1&scan.nii.gz=BYTES&...   the files one after the other -> the prepared scan
    POST   TOKEN/answer    {"key": ..., "question": ...} -> {"answer": ...}
    GET    TOKEN/scan/KEY  the viewer of the scan after its pipeline
    DELETE TOKEN/scan/KEY
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.faults import describe_os_error
from umbrella_data.modality import find_modality
from umbrella_train.app.page import read_asset, render_page, render_viewer
from umbrella_train.app.session import Session

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

HOST = "127.0.0.1"
"""The only address that the server listens on."""
_NIFTI = (".nii", ".nii.gz")
_MAX_QUESTION_BYTES = 1 << 16
_MAX_DIGITS = 18
# A stalled upload would keep others waiting.
_CHUNK_SECONDS = 60.0
_HEADERS = {
    # Only files of this server. NiiVue has pictures in its file, and the viewer its style.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src blob:; frame-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def build_server(
    session: Session, folder: Path, *, port: int, token: str, uploads: Path, max_bytes: int
) -> uvicorn.Server:
    """The server; in the main thread, its `run` ends at a signal, which is then raised again.

    Args:
        session: The model.
        folder: Its run, for the page.
        port: Port of the socket on `HOST` that it runs on.
        token: The first part of every path.
        uploads: An existing folder for files while they are read.
        max_bytes: The most bytes of a scan with its files.

    Raises:
        RunError: The files of the run cannot be read.
    """
    import uvicorn  # late: an extra

    page = render_page(folder, modalities=session.modalities, max_bytes=max_bytes)
    routes = _Routes(session, page=page, uploads=uploads, max_bytes=max_bytes)
    config = uvicorn.Config(
        _Guard(routes.app(token), token=token, port=port),
        headers=list(_HEADERS.items()),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


class _Guard:
    """Rejects requests without the token, for another host (DNS rebinding) and from pages of other sites."""

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self._app = app
        self._token = token
        self._hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        # Browsers give the origin of everything but reading.
        is_own = origin == f"http://{host}" or (origin is None and scope["method"] in ("GET", "HEAD"))
        given, _, _ = scope["path"].removeprefix("/").partition("/")
        has_token = secrets.compare_digest(given.encode(), self._token.encode())
        if host in self._hosts and is_own and has_token:
            await self._app(scope, receive, send)
            return
        await _error(403, "open the address that umbrella-app printed, with its token and port")(scope, receive, send)


class _Routes:
    """What the paths below the token do; scans and questions one at a time."""

    def __init__(self, session: Session, *, page: str, uploads: Path, max_bytes: int) -> None:
        self._session = session
        self._page = page
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._lock = asyncio.Lock()

    def app(self, token: str) -> ASGIApp:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.routing import Mount, Route

        handlers: dict[Any, Callable[[Request, Any], Response]] = {
            HTTPException: lambda _, error: _error(error.status_code, error.detail),
            ClientDisconnect: lambda *_: _error(400, "the upload ended early"),
            ScanError: _scan_error,
            ValueError: lambda _, error: _error(400, str(error)),
            ImportError: lambda _, error: _error(501, str(error)),
            OSError: self._system_error,
            Exception: _unexpected_error,
        }
        routes = [
            Route("/", self._show_page),
            Route("/app.css", partial(_show_asset, name="app.css", media_type="text/css")),
            *(
                Route(f"/{name}", partial(_show_asset, name=name, media_type="text/javascript"))
                for name in ("app.js", "viewer.js")
            ),
            Route("/scan", self._prepare, methods=["POST"]),
            Route("/scan/{key}", self._show_scan),
            Route("/scan/{key}", self._remove, methods=["DELETE"]),
            Route("/answer", self._answer, methods=["POST"]),
        ]
        return Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=handlers)

    async def _show_page(self, _request: Request) -> Response:
        from starlette.responses import HTMLResponse

        return HTMLResponse(self._page)

    async def _show_scan(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        return HTMLResponse(render_viewer(self._session.find(request.path_params["key"]).viewer))

    async def _prepare(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        sizes = dict(request.query_params)
        modality = sizes.pop("modality", "")
        files = self._check_files(modality, sizes, length=request.headers.get("content-length"))
        async with self._lock:
            self._session.prepared = None
            # Removed as soon as the scan is prepared or rejected, or the server stops.
            with TemporaryDirectory(dir=self._uploads) as name:
                folder = Path(name)
                # Side files are inherited from the folders above, up to this file.
                (folder / "dataset_description.json").touch()
                await _receive(request, files, folder=folder)
                paths = [folder / file for file in files if file.startswith(("scan.nii", "map-"))]
                masks = [folder / file for file in files if file.startswith("mask.")]
                prepare = partial(self._session.prepare, modality, paths, mask=masks[0] if masks else None)
                prepared = await _in_thread(prepare)
            # A page that was closed meanwhile does not know the key, and cannot remove the scan.
            if await request.is_disconnected():
                self._session.prepared = None
                raise ClientDisconnect
        shape = list(prepared.volume.shape)
        return JSONResponse({"key": prepared.key, "shape": shape, "warning": prepared.warning})

    def _check_files(self, modality: str, sizes: Mapping[str, str], *, length: str | None) -> dict[str, int]:
        """The sizes of the files of a scan; names are those of the page, never the user's.

        Raises:
            ValueError: A name or size is not valid, or there is no scan.
            HTTPException: The files are too large.
        """
        from starlette.exceptions import HTTPException

        known = known_files(modality)
        if wrong := [name for name in sizes if name not in known]:
            raise ValueError(f"{', '.join(wrong)}: not a file of a {modality} scan; known are {', '.join(known)}")
        if not all(size.isascii() and size.isdecimal() and len(size) <= _MAX_DIGITS for size in sizes.values()):
            raise ValueError("each file needs its size in bytes")
        files = {name: int(size) for name, size in sizes.items()}
        total = sum(files.values())
        if total > self._max_bytes:
            limit = f"{self._max_bytes / 1e9:g} GB"
            raise HTTPException(413, f"the files have {total / 1e9:.3g} GB; at most {limit} are accepted (--max-gb)")
        if length != str(total):
            raise ValueError("the sizes of the files are not those of the upload")
        if len([name for name in files if name.startswith("scan.nii")]) != 1:
            raise ValueError("give one scan, a .nii or .nii.gz file")
        return files

    async def _answer(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_QUESTION_BYTES:
                raise ValueError("the question is too long")
        key, question = read_question(body)
        async with self._lock:
            answer = await _in_thread(partial(self._session.answer, key, question))
        return JSONResponse({"answer": answer})

    async def _remove(self, request: Request) -> Response:
        from starlette.responses import Response

        async with self._lock:
            self._session.find(request.path_params["key"])
            self._session.prepared = None
        return Response(status_code=204)

    def _system_error(self, _request: Request, error: OSError) -> Response:
        return _error(507, describe_os_error(error, folder=self._uploads) or str(error))


def known_files(modality: str) -> list[str]:
    """The names that the files of a scan may have: maps after the first are `map-2`, and so on.

    Raises:
        ValueError: For an unknown modality.
    """
    spec = find_modality(modality)
    parts = ["scan", *(f"map-{number}" for number in range(2, spec.num_channels + 1)), "mask"]
    names = [f"{part}{suffix}" for part in parts for suffix in _NIFTI]
    names += ["scan.bval", "scan.bvec"] if spec.num_channels > 1 else []
    return [*names, "scan.json"] if spec.is_series else names


def read_question(body: bytes) -> tuple[str, str]:
    """The key of the scan and the question.

    Raises:
        ValueError: It is not JSON of these, or the question has half of a surrogate pair.
    """
    try:
        content = json.loads(body)
        key, question = content["key"], content["question"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError('the body must be {"key": ..., "question": ...}') from error
    if not isinstance(key, str) or not isinstance(question, str):
        raise ValueError("key and question must be text")
    if any(unicodedata.category(character) == "Cs" for character in question):
        raise ValueError("the question has half of a character (a surrogate); type it again")
    return key, question


async def _receive(request: Request, files: Mapping[str, int], *, folder: Path) -> None:
    """Writes the body to the files, one after the other.

    Raises:
        ValueError: The body is too short, or stalls.
    """
    chunks = request.stream()
    rest = b""
    for name, size in files.items():
        with (folder / name).open("xb") as file:
            missing = size
            while missing:
                try:
                    async with asyncio.timeout(_CHUNK_SECONDS):
                        rest = rest or await anext(chunks)
                except TimeoutError:
                    raise ValueError(f"no data for {_CHUNK_SECONDS:g} s; give the scan again") from None
                if not rest:
                    raise ValueError("the upload ended early")
                part, rest = rest[:missing], rest[missing:]
                missing -= file.write(part)


async def _in_thread(function: Callable[[], Result]) -> Result:
    """Its result; if the server stops, the thread is not waited for."""
    from anyio.to_thread import run_sync

    return await run_sync(function, abandon_on_cancel=True)


async def _show_asset(_request: Request, *, name: str, media_type: str) -> Response:
    from starlette.responses import Response

    return Response(read_asset(name), media_type=media_type)


def _error(status: int, message: str, **more: str) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"message": message, **more}, status)


def _scan_error(_request: Request, error: ScanError) -> Response:
    # The page has no use for the temporary folder.
    message = error.message.replace(f"{Path(error.path).parent}{os.sep}", "")
    return _error(422, message, reason=error.reason, meaning=ScanReason(error.reason).meaning,
                  file=Path(error.path).name)  # fmt: skip


def _unexpected_error(_request: Request, error: Exception) -> Response:
    logger.error("unexpected error", exc_info=error)
    return _error(500, f"unexpected error ({type(error).__name__}); the terminal of umbrella-app shows more")
