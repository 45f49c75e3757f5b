"""The voting page: who may ask it, what a kill leaves, and a real browser that votes with its keyboard."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from voting import HTML, voting_store

from jobs import votes
from jobs.label import page as pages
from jobs.label.ballot import Ballot, pairs, picks
from jobs.label.booth import Booth
from jobs.label.serve import listen
from schemas.errors import WinnowError
from storage.query import user_query

HOME = Path(__file__).parent.parent
TOKEN = "only-for-tests"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH: apt-get install chromium")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip
LOADED = "which => [...document.querySelectorAll(which)].every(image => image.naturalWidth === 16)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voting_store(tmp_path_factory.mktemp("voting") / "store")


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def ask(store: Path, sql: str) -> list[dict[str, Any]]:
    return user_query(store, sql).to_pylist()


@contextmanager
def serving(store: Path, ballot: Ballot) -> Iterator[int]:
    """The page on a free port, in a thread of this process."""
    import uvicorn

    with listen(0) as taken:
        port = taken.getsockname()[1]
        config = uvicorn.Config(pages.page(Booth(store, ballot), TOKEN, port), log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(30)


@dataclass
class Client:
    """A browser that says what it is told to."""

    port: int

    def __call__(
        self, method: str, path: str, body: Any = None, **change: str | None
    ) -> tuple[int, bytes, dict[str, str]]:
        usual = {"Host": f"127.0.0.1:{self.port}", "Cookie": f"winnow-{self.port}={TOKEN}"}
        if method == "POST":
            usual |= {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        headers = {name: value for name, value in (usual | change).items() if value is not None}
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        link.request(method, path, None if body is None else json.dumps(body), headers)
        answer = link.getresponse()
        found = answer.status, answer.read(), dict(answer.getheaders())
        link.close()
        return found


ROUTES = [
    ("GET", "/"), ("GET", "/label.js"), ("GET", "/label.css"), ("GET", "/image/{id}"), ("GET", "/task?voter=ada"),
    ("POST", "/vote"), ("POST", "/undo"),
]  # fmt: skip


def test_every_route_checks_host_origin_and_token(store: Path) -> None:
    ballot = picks(store, "curated", 1)
    number = ballot.tasks[0].ids[0]
    body = {"voter": "ada", "question": "keep", "sample": str(number), "choice": "keep"}
    with serving(store, ballot) as port:
        client = Client(port)
        for method, path in ROUTES:
            path = path.format(id=number)
            told = {"/vote": body, "/undo": {"voter": "ada"}}.get(path)
            refused: list[dict[str, str | None]] = [
                {"Host": f"evil.example:{port}"}, {"Host": "127.0.0.1"}, {"Host": f"127.0.0.1.evil.example:{port}"},
                {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": f"https://127.0.0.1:{port}"},
                {"Origin": f"http://127.0.0.1:{port + 1}"}, {"Cookie": None}, {"Cookie": f"winnow-{port}=wrong"},
                {"Cookie": f"winnow-{port}="},
            ]  # fmt: skip
            refused += [{"Origin": None}] if method == "POST" else []
            for change in refused:
                status, said, headers = client(method, path, told, **change)
                assert status == 403, (method, path, change)
                assert TOKEN.encode() not in said and "set-cookie" not in {name.lower() for name in headers}
            status, _, headers = client(method, path, told)
            assert status == 200, (method, path)
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert client("GET", "/image/" + str(number), Host=f"localhost:{port}")[0] == 200
        assert client("GET", "/docs")[0] == client("GET", "/openapi.json")[0] == 404
    # One vote and its undoing: what was refused left nothing.
    assert [row["choice"] for row in ask(store, "SELECT choice FROM votes ORDER BY voted_at")] == ["keep", "retract"]


def test_the_token_moves_from_the_address_into_a_cookie(store: Path) -> None:
    with serving(store, picks(store, "curated", 1)) as port:
        client = Client(port)
        status, _, headers = client("GET", f"/?token={TOKEN}", Cookie=None)
        assert status == 303 and headers["location"] == "/"
        cookie = headers["set-cookie"]
        assert TOKEN in cookie and "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        for wrong in ("", "x", TOKEN[:-1], TOKEN + "x", "%C3%A9"):
            assert client("GET", f"/?token={wrong}", Cookie=None)[0] == 403
        assert client("GET", f"/task?voter=ada&token={TOKEN}", Cookie=None)[0] == 403


def test_the_page_is_on_this_machine_alone(store: Path) -> None:
    with serving(store, picks(store, "curated", 1)) as port:
        listed = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        mine = {line[1].split(":")[0] for line in listed if line[1].endswith(f":{port:04X}") and line[3] == "0A"}
        assert mine == {"0100007F"}  # 127.0.0.1
        assert not [line for line in Path("/proc/net/tcp6").read_text().splitlines() if f":{port:04X} " in line]
        with pytest.raises(WinnowError, match=rf"--port {port}: cannot be opened \(.+\); give another"):
            listen(port)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200), ({"voter": ""}, 422), ({"voter": "a" * 41}, 422), ({"voter": "../../x"}, 422), ({"extra": 1}, 422),
        ({"voter": "a\ud800"}, 422),
        ({"choice": "left"}, 409), ({"choice": "burn"}, 422), ({"sample": "17"}, 409), ({"sample": "-1"}, 422),
        ({"sample": str(2**70)}, 422), ({"other": "17"}, 409), ({"seconds": -1}, 422), ({"voter": "x" * 5000}, 413),
        ({"sample": "9" * 19}, 409),
    ],
)  # fmt: skip
def test_a_wrong_vote_is_refused(store: Path, change: dict[str, Any], status: int) -> None:
    ballot = picks(store, "curated", 1)
    body = {"voter": "ada", "question": "keep", "sample": str(ballot.tasks[0].ids[0]), "choice": "keep"} | change
    with serving(store, ballot) as port:
        found, said, _ = Client(port)("POST", "/vote", body)
        assert found == status, said
        assert Client(port)("POST", "/vote", "no object")[0] == 422
    assert len(ask(store, "SELECT * FROM votes")) == (status == 200)


def test_votes_of_several_people_at_once_are_all_kept(store: Path) -> None:
    ballot = picks(store, "curated", 1)
    ids = [number for task in ballot.tasks for number in task.ids]
    with serving(store, ballot) as port:

        def vote(voter: str) -> None:
            for number in ids:
                body = {"voter": voter, "question": "keep", "sample": str(number), "choice": "keep"}
                assert Client(port)("POST", "/vote", body)[0] == 200

        threads = [threading.Thread(target=vote, args=(name,)) for name in ("ada", "bob", "eve")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    found = ask(store, "SELECT voter, count(*) AS n FROM opinions GROUP BY voter ORDER BY voter")
    assert found == [{"voter": name, "n": len(ids)} for name in ("ada", "bob", "eve")]


def start(store: Path, *words: str) -> tuple[subprocess.Popen[str], str, int]:
    """``winnow label`` as a process, its address and port."""
    command = [sys.executable, "-m", "jobs.cli", "label", *words, "--store", str(store)]
    process = subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    found = re.search(r"(http://127\.0\.0\.1:(\d+)/)\?token=([\w-]+)", line)
    assert found, line + process.stderr.read()  # type: ignore[union-attr]
    return process, found[3], int(found[2])


def post(port: int, token: str, path: str, body: Any) -> tuple[int, Any]:
    until = time.monotonic() + 60
    while True:
        try:
            status, said, _ = Client(port)("POST", path, body, Cookie=f"winnow-{port}={token}")
            return status, json.loads(said)
        except ConnectionError:  # it has the port, and is not ready to answer
            assert time.monotonic() < until
            time.sleep(0.1)


def test_a_vote_outlives_a_kill(store: Path) -> None:
    ballot = pairs(store, ["base", "curated:1"], 4)
    first = Booth(store, ballot).view("ada")
    words = ("pairs", "--contestants", "base,curated:1", "--limit", "4")
    process, token, port = start(store, *words)
    body = {"voter": "ada", "question": "appeal", "sample": first["left"], "other": first["right"], "choice": "left"}
    status, then = post(port, token, "/vote", body)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert status == 200 and then["done"] == 1
    again = Booth(store, ballot)
    assert again.view("ada") == then and len(ask(store, "SELECT * FROM votes")) == 1
    process, token, port = start(store, *words)
    assert post(port, token, "/undo", {"voter": "ada"})[1]["undone"] is True
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "no votes yet" in out and not err, (out, err)
    assert len(ask(store, "SELECT * FROM votes")) == 2


def test_the_command_line(store: Path, winnow: Callable[..., Any]) -> None:
    assert winnow("label", "--results", "--store", store).out == "no votes yet\n"
    votes.cast(store, "ada", "keep", Booth(store, picks(store, "curated", 1)).ballot.tasks[0].ids[0], None, "keep")
    assert winnow("label", "--results", "--store", store).out == "keep: 1 votes of 1 voters\n"
    assert "allowed are picks and pairs" in winnow("label", "dance", "--store", store).line
    assert "no store here" in winnow("label", "--store", store / "none").line


# --- a real browser ----------------------------------------------------------------------------------------


@dataclass
class Seen:
    page: Any
    problems: list[str]
    asked: list[str]

    def step(self, key: str) -> None:
        """Press a key, and wait until the page has taken it."""
        before = self.page.locator("#count").inner_text()
        self.page.keyboard.press(key)
        self.page.wait_for_function("before => document.getElementById('count').innerText !== before", arg=before)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield found
        found.close()


@pytest.fixture
def seen(chromium: Any) -> Iterator[Seen]:
    context = chromium.new_context(viewport={"width": 1000, "height": 800})
    page = context.new_page()
    found = Seen(page, [], [])
    page.on("console", lambda message: found.problems.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: found.problems.append(str(error)))
    page.on("request", lambda request: found.asked.append(request.url))
    yield found
    context.close()


def enter(seen: Seen, port: int, name: str) -> None:
    seen.page.goto(f"http://127.0.0.1:{port}/?token={TOKEN}")
    seen.page.fill("#voter", name)
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_selector("#count:not(:empty)")


def sound(seen: Seen, port: int) -> None:
    """No errors, nothing asked of anybody else, and no token left in the address."""
    assert seen.problems == []
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in seen.asked)
    assert TOKEN not in seen.page.url


@needs_chromium
def test_a_browser_compares_pairs(store: Path, seen: Seen, tmp_path: Path) -> None:
    ballot = pairs(store, ["base", "curated:1"], 2)
    page = seen.page
    with serving(store, ballot) as port:
        enter(seen, port, "Ada")
        assert page.locator("#count").inner_text() == "0 of 4"
        expected = Booth(store, ballot).view("Ada")
        assert page.locator("#left img").get_attribute("src") == f"/image/{expected['left']}"
        page.wait_for_function(LOADED, arg="#pair img")
        assert page.locator("#question").inner_text() == "Which image looks better?"
        page.screenshot(path=tmp_path / "pair.png")
        seen.step("ArrowLeft")
        assert page.locator("#question").inner_text() == "Which image shows the text better?"
        seen.step("ArrowDown")
        second = Booth(store, ballot).view("Ada")
        page.reload()  # goes on where it was, under the same name
        page.wait_for_selector("#pair:not([hidden])")
        assert page.locator("#count").inner_text() == "2 of 4"
        assert page.locator("#right img").get_attribute("src") == f"/image/{second['right']}"
        seen.step("2")
        seen.step("u")
        assert page.locator("#count").inner_text() == "2 of 4"
        page.click("#right")
        page.wait_for_function("() => document.getElementById('count').innerText === '3 of 4'")
        seen.step("s")
        page.wait_for_selector("#done:not([hidden])")
        page.screenshot(path=tmp_path / "done.png")
        sound(seen, port)
    rows = ask(store, "SELECT question, sample_id, other_id, choice, seconds FROM votes ORDER BY voted_at")
    assert [row["choice"] for row in rows] == ["left", "skip", "right", "retract", "right", "skip"]
    assert [row["question"] for row in rows][:3] == ["appeal", "faithfulness", "appeal"]
    assert (str(rows[0]["sample_id"]), str(rows[0]["other_id"])) == (expected["left"], expected["right"])
    assert all(row["seconds"] > 0 for row in rows if row["choice"] != "retract")
    assert ask(store, "SELECT choice FROM opinions ORDER BY voted_at") == [
        {"choice": choice} for choice in ("left", "skip", "right", "skip")
    ]


def test_a_port_that_was_just_left_is_free() -> None:
    with listen(0) as first:
        port = first.getsockname()[1]
        first.listen()
        with socket.create_connection(("127.0.0.1", port)) as client:
            there, _ = first.accept()
            there.close()  # the side that closes first keeps the port for a minute
            client.recv(1)
    listen(port).close()


@needs_chromium
def test_a_browser_picks_candidates(store: Path, seen: Seen, tmp_path: Path) -> None:
    ballot = picks(store, "curated", 1)
    page = seen.page
    with serving(store, ballot) as port:
        enter(seen, port, "Bob")
        assert page.locator("#count").inner_text() == "0 of 40, 0 kept"
        page.wait_for_function(LOADED, arg=".tile img")
        seen.step("k")  # the first, and on to the second
        seen.step("d")
        seen.step("k")
        page.keyboard.press("ArrowLeft")
        seen.step("u")
        seen.step("d")
        page.screenshot(path=tmp_path / "sheet.png", full_page=True)
        choices = page.locator(".tile").evaluate_all("tiles => tiles.map(tile => tile.dataset.choice)")
        assert choices[:4] == ["keep", "drop", "drop", ""] and len(choices) == 24
        page.keyboard.press("n")
        page.wait_for_function("() => document.querySelectorAll('.tile').length === 16")
        seen.step("k")
        page.keyboard.press("p")
        page.wait_for_function("() => document.querySelectorAll('.tile').length === 24")
        page.locator(".tile").nth(5).dispatch_event("click")  # without focus, as some browsers click
        page.wait_for_function("() => document.getElementById('count').innerText === '5 of 40, 3 kept'")
        page.reload()
        page.wait_for_function("() => document.getElementById('count').innerText === '5 of 40, 3 kept'")
        sound(seen, port)
    ids = ballot.tasks[0].ids
    found = {row["sample_id"]: row["choice"] for row in ask(store, "SELECT sample_id, choice FROM opinions")}
    assert found == {ids[0]: "keep", ids[1]: "drop", ids[2]: "drop", ballot.tasks[1].ids[0]: "keep", ids[5]: "keep"}


@needs_chromium
def test_a_prompt_with_html_in_it_is_text(store: Path, seen: Seen) -> None:
    ballot = picks(store, "curated", 1)
    with serving(store, ballot) as port:
        enter(seen, port, "José 李雷")
        assert seen.page.locator("h2").first.inner_text() == HTML
        assert seen.page.title() == "Winnow: votes" and seen.page.locator("#groups img[onerror]").count() == 0
        sound(seen, port)


@needs_chromium
def test_a_vote_that_is_not_saved_is_said(store: Path, seen: Seen) -> None:
    ballot = picks(store, "curated", 1)
    with serving(store, ballot) as port:
        enter(seen, port, "Ada")
        shutil.move(store / "tables", store / "away")
        (store / "tables").write_text("in the way")
        seen.page.keyboard.press("k")
        seen.page.wait_for_selector("#problem:not([hidden])")
        assert "Not saved" in seen.page.locator("#problem").inner_text()
        assert seen.page.locator("#count").inner_text() == "0 of 40, 0 kept"
        (store / "tables").unlink()
        shutil.move(store / "away", store / "tables")
        seen.step("k")
        assert seen.page.locator("#problem").is_hidden()
        assert seen.page.locator("#count").inner_text() == "1 of 40, 1 kept"
    assert len(ask(store, "SELECT * FROM votes")) == 1


@needs_chromium
def test_the_page_fits_a_phone(store: Path, chromium: Any, tmp_path: Path) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    seen = Seen(context.new_page(), [], [])
    with serving(store, pairs(store, ["base", "curated:1"], 2)) as port:
        enter(seen, port, "Ada")
        seen.page.wait_for_function(LOADED, arg="#pair img")
        seen.page.screenshot(path=tmp_path / "phone.png")
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
