"""The page: the routes of a booth, which answer nobody but the browser that was given the token."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from jobs.label.booth import Booth
from jobs.progress import say
from schemas.errors import WinnowError

TEMPLATES = Path(__file__).parents[1] / "templates"
PAUSE = 10.0  # seconds between two seals, at least
LARGEST = 4096  # bytes of a request
NAME = r"^[\w.@-][\w .@-]{0,39}$"
KINDS = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip

Voter = Annotated[str, Field(pattern=NAME)]
Next = Callable[[Request], Awaitable[Response]]


class Undo(BaseModel):
    """Ids are text: JavaScript's numbers hold no 63 bits."""

    model_config = ConfigDict(extra="forbid")

    voter: Voter
    at: int | None = None


class Vote(Undo):
    question: Literal["keep", "appeal", "faithfulness"]
    sample: Annotated[str, Field(pattern=r"^\d{1,19}$")]
    other: Annotated[str, Field(pattern=r"^\d{1,19}$")] | None = None
    choice: Literal["keep", "drop", "left", "right", "skip"]
    seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0


def page(booth: Booth, token: str, port: int) -> FastAPI:
    """The application that serves ``booth`` on 127.0.0.1:``port`` to whoever comes with ``token``."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        sealing = asyncio.create_task(_seal(booth))
        yield
        sealing.cancel()
        with suppress(asyncio.CancelledError):
            await sealing
        await asyncio.to_thread(booth.seal)

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    names = ("127.0.0.1", "localhost")
    hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())  # browsers leave :80 out
    cookie = f"winnow-{port}"

    @app.middleware("http")
    async def guard(request: Request, go_on: Next) -> Response:
        if refusal := _refusal(request, hosts, request.cookies.get(cookie, ""), token):
            return PlainTextResponse(refusal + "\n", 403, HEADERS)
        if int(request.headers.get("content-length") or 0) > LARGEST or "transfer-encoding" in request.headers:
            return PlainTextResponse("too large\n", 413, HEADERS)
        response = await go_on(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(WinnowError)
    async def refused(_: Request, error: WinnowError) -> Response:
        return JSONResponse({"error": str(error)}, 409)

    @app.exception_handler(RequestValidationError)
    async def odd(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": error.errors()[0]["msg"]}, 422)  # and not what came: it may be no text

    @app.get("/")
    def start(request: Request) -> Response:
        if "token" not in request.query_params:
            return FileResponse(TEMPLATES / "label.html", media_type="text/html; charset=utf-8")
        # Into a cookie and out of the address, which ends up in histories and screenshots.
        answer = RedirectResponse("/", 303)
        answer.set_cookie(cookie, token, httponly=True, samesite="strict")
        return answer

    @app.get("/label.{kind}")
    def asset(kind: Literal["js", "css"]) -> Response:
        media = {"js": "text/javascript", "css": "text/css"}[kind]
        return FileResponse(TEMPLATES / f"label.{kind}", media_type=f"{media}; charset=utf-8")

    @app.get("/image/{number}")
    def image(number: int) -> Response:
        file = booth.image(number)
        kind = next((kind for head, kind in KINDS if file.startswith(head)), "application/octet-stream")
        return Response(file, media_type=kind)

    @app.get("/task")
    def task(voter: Annotated[str, Query(pattern=NAME)], at: int | None = None) -> dict[str, Any]:
        return booth.view(voter, at)

    @app.post("/vote")
    def vote(one: Vote) -> dict[str, Any]:
        other = None if one.other is None else int(one.other)
        booth.cast(one.voter, one.question, int(one.sample), other, one.choice, one.seconds)
        return booth.view(one.voter, one.at)

    @app.post("/undo")
    def undo(one: Undo) -> dict[str, Any]:
        return {"undone": booth.undo(one.voter)} | booth.view(one.voter, one.at)

    return app


def _refusal(request: Request, hosts: set[str], shown: str, token: str) -> str:
    """Why a request is not answered, or nothing. Another page in the same browser can send one, under another name for
    this machine, too: so the host must be ours, the origin as well, and the token must come along."""
    if request.headers.get("host") not in hosts:
        return "this page has another address"
    origin = request.headers.get("origin")
    if origin is None and request.method not in ("GET", "HEAD"):
        return "no origin"
    if origin is not None and origin.removeprefix("http://") not in hosts:
        return "another origin"
    if request.url.path == "/":
        shown = request.query_params.get("token", shown)
    if not re.fullmatch(r"[\w-]+", shown, re.ASCII) or not secrets.compare_digest(shown, token):
        return "no token: open the address that 'winnow label' printed"
    return ""


async def _seal(booth: Booth) -> None:
    """Seal the first vote at once, and those that follow together."""
    last = -PAUSE
    while True:
        if time.monotonic() - last >= PAUSE:
            try:
                if await asyncio.to_thread(booth.seal):
                    last = time.monotonic()
            except WinnowError as error:  # the votes are committed, and sealed by whoever reads them next
                say(f"label: {error}")
                last = time.monotonic()
        await asyncio.sleep(0.25)
