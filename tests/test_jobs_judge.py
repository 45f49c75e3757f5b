"""A language model as judge, over a real HTTP server that misbehaves: nothing is asked twice, no answer is lost, and
the key stays where it belongs."""

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import ForkServer, rows
from endpoint import KEY, Handler, Server
from hypothesis import given
from hypothesis import strategies as st

from jobs import recipe as recipes
from jobs.language.answers import Task, answers
from jobs.language.endpoint import Endpoint, Reply, check_url
from jobs.language.judge import QUESTION, Judge, grades, model, question, quoted
from jobs.prompts import prompts
from jobs.run import Run
from schemas.errors import WinnowError
from storage.layout import create
from storage.snapshot import numbers
from storage.verify import verify

TEXTS = [f"a {colour} {thing} on a wooden table" for colour in ("red", "green", "blue", "white", "black")
         for thing in ("cup", "lamp", "violin", "cactus", "globe", "kettle")]  # fmt: skip

def a_run(tmp_path: Path, address: str, texts: list[str] = TEXTS, **judge: Any) -> Run:
    source = tmp_path / "p.txt"
    source.write_text("\n".join(texts) + "\n")
    table = {"kind": "endpoint", "url": address, "model": "judge-1", "key_env": "JUDGE_KEY", "backoff": 0.01}
    changes: Any = {"source": str(source), "near": None, "judge": table | judge}
    return Run(create(tmp_path / "store"), recipes.override(recipes.load("embedded"), [(["prompts"], changes)]))


def reasons(run: Run) -> dict[str, str | None]:
    return {row["text"]: row["reason"] for row in rows(run.store, "SELECT text, reason FROM prompts")}


def answered(run: Run) -> dict[str, dict[str, Any]]:
    return {row["text"]: row for row in rows(run.store, "SELECT * FROM answers")}


def test_every_prompt_is_asked_once_and_graded_in_tenths(server: Server, tmp_path: Path) -> None:
    server.act = lambda handler, prompt, number: handler.good(4 if "red" in prompt else 9, 2 if "cup" in prompt else 3)
    run = a_run(tmp_path, server.url)
    run = Run(run.store, recipes.override(run.recipe, [(["prompts", "least_clarity"], 0.5),
                                                       (["prompts", "least_specificity"], 0.3)]))  # fmt: skip
    prompts(run)
    assert server.asked == Counter(TEXTS)
    for text, reason in reasons(run).items():
        want = "unclear: 0.40 < 0.5" if "red" in text else "unspecific: 0.20 < 0.3" if "cup" in text else None
        assert reason == want, text
    kept = answered(run)
    assert {row["model"] for row in kept.values()} == {"judge-1"} and len({r["revision"] for r in kept.values()}) == 1
    assert {(row["clarity"], row["specificity"]) for row in kept.values()} == {(4, 2), (4, 3), (9, 2), (9, 3)}
    path, key, body = server.seen[0]
    assert path == "/v1/chat/completions" and key == f"Bearer {KEY}"
    assert body["model"] == "judge-1" and body["temperature"] == 0 and body["max_tokens"] == 400
    assert verify(run.store).ok and not verify(run.store).notes
    # A rerun asks nothing, seals nothing, and needs no key.
    sealed = numbers(run.store)
    os.environ.pop("JUDGE_KEY")
    prompts(run)
    assert server.asked == Counter(TEXTS) and numbers(run.store) == sealed


def too_slow(handler: Handler, prompt: str) -> None:
    handler.landed()  # it is given up before
    time.sleep(1.2)
    handler.good()


def dripping(handler: Handler, prompt: str) -> None:
    """Each packet comes in time, and all of them too late."""
    body = json.dumps({"choices": [{"message": {"content": '{"clarity": 8, "specificity": 7}'}}]}).encode()
    handler.landed()
    handler.send_response(200)
    handler.send_header("Content-Length", str(12 + len(body)))
    handler.end_headers()
    for _ in range(12):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)
    handler.wfile.write(body)


def closes(handler: Handler, prompt: str) -> None:
    handler.landed()
    handler.connection.shutdown(socket.SHUT_RDWR)


HALF = b'{"choices": [{"message": {"content": "{\\"clarity\\": 9, '
#: What the server does to one request: it gets the handler and the prompt.
Act = Callable[[Handler, str], None]
#: Trouble of the way: the question is asked again, and then answered.
PASSING: dict[str, Act] = {
    "429": lambda handler, _: handler.send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
    "500": lambda handler, _: handler.send(500, b"<html>oops</html>"),
    "503 with odd Retry-After": lambda handler, _: handler.send(503, b"", {"Retry-After": "soon"}),
    "half a body": lambda handler, _: handler.send(200, HALF, length=len(HALF) + 40),
    "half of the JSON": lambda handler, _: handler.send(200, HALF),
    "not JSON": lambda handler, _: handler.send(200, b"<html>welcome</html>"),
    "another shape": lambda handler, _: handler.send(200, b'{"choices": []}'),
    "a list": lambda handler, _: handler.send(200, b"[1]"),
    "no bytes at all": lambda handler, _: handler.send(200, b""),
    "connection closed": closes,
    "too slow": too_slow,
    "dripping": dripping,
}


def test_trouble_that_passes_is_waited_out(server: Server, tmp_path: Path) -> None:
    """Each kind strikes one prompt twice; all are judged in the end, with two more requests each."""
    struck = dict(zip(TEXTS, PASSING.values(), strict=False))
    assert len(struck) == len(PASSING)

    def act(handler: Handler, prompt: str, number: int) -> None:
        time.sleep(0.05)  # so that others come meanwhile
        struck[prompt](handler, prompt) if prompt in struck and number <= 2 else handler.good()

    server.act = act
    run = a_run(tmp_path, server.url, timeout=0.5, in_flight=5)
    prompts(run)
    assert set(reasons(run).values()) == {None}
    assert server.asked == Counter({text: 3 if text in struck else 1 for text in TEXTS})
    assert 1 < server.most <= 5


#: Answers of the model that are no good: recorded with the reason, and not asked again.
BAD: dict[str, tuple[Any, str]] = {
    "prose": ("I would say that it is quite clear.", "no JSON object with clarity and specificity"),
    "half": ('{"clarity": 8, "speci', "no JSON object"),
    "no number": ('{"clarity": 8}', "the answer has no specificity"),
    "too large": ('{"clarity": 11, "specificity": 5}', "clarity is 11, not in 1..10"),
    "zero": ('{"clarity": 5, "specificity": 0}', "specificity is 0, not in 1..10"),
    "a fraction": ('{"clarity": 7.5, "specificity": 5}', "clarity is '7.5', not a whole number"),
    "a word": ('{"clarity": "high", "specificity": 5}', "clarity is 'high', not a whole number"),
    "true": ('{"clarity": true, "specificity": 5}', "clarity is 'True'"),
    "not a number": ('{"clarity": NaN, "specificity": 5}', "clarity is 'nan'"),
    "endless": ('{"clarity": Infinity, "specificity": 5}', "clarity is 'inf'"),
    "two": ('{"clarity": 1, "specificity": 1} or {"clarity": 9, "specificity": 9}', "2 different grades"),
    "nested": ("[" * 100_000, "no JSON object"),
    "long number": ('{"clarity": ' + "9" * 5000 + ', "specificity": 5}', "no JSON object"),
    "nothing": ("", "the model says nothing"),
    "null": (None, "the model says nothing"),
    "a list": ([{"type": "text"}], "the model says nothing"),
}


def test_bad_answers_are_recorded_rejects(server: Server, tmp_path: Path) -> None:
    bad = dict(zip(TEXTS, BAD.values(), strict=False))

    def act(handler: Handler, prompt: str, number: int) -> None:
        if prompt == TEXTS[-1]:
            handler.say('{"clarity": 8, "specificity": 8}', "length")
        elif prompt == TEXTS[-2]:
            handler.send(400, json.dumps({"error": {"message": f"refused by the content filter, {KEY}"}}).encode())
        else:
            handler.say(bad[prompt][0]) if prompt in bad else handler.good()

    server.act = act
    run = a_run(tmp_path, server.url)
    prompts(run)
    said = reasons(run)
    for text, (_, why) in bad.items():
        assert said[text] and said[text].startswith("not judged: ") and why in said[text], said[text]
    assert "half an answer" in str(said[TEXTS[-1]])
    assert "HTTP 400 (refused by the content filter, [key])" in str(said[TEXTS[-2]])
    assert [text for text in TEXTS if said[text] is None] == TEXTS[len(BAD) : -2]
    assert server.asked == Counter([*TEXTS, "control"])
    assert all(answered(run)[text]["problem"] and answered(run)[text]["clarity"] is None for text in bad)


def test_retry_after_is_honoured_by_everybody(server: Server, tmp_path: Path) -> None:
    def act(handler: Handler, prompt: str, number: int) -> None:
        if server.asked.total() == 1:
            handler.send(429, b"", {"Retry-After": "1"})
        else:
            handler.good()

    server.act = act
    began = time.monotonic()
    run = a_run(tmp_path, server.url, in_flight=1)
    prompts(run)
    first, second = server.times[:2]
    assert second - first >= 0.95 and time.monotonic() - began < 10


def test_retry_after_as_a_date(server: Server) -> None:
    def act(handler: Handler, prompt: str, number: int) -> None:
        date = formatdate(time.time() + 2, usegmt=True)
        handler.send(503, b"", {"Retry-After": date}) if number == 1 else handler.good()

    server.act = act
    endpoint = Endpoint(server.url, "m", backoff=0.001)
    assert [reply.problem for _, reply in endpoint(["q"])] == [None]
    assert 0.9 < server.times[1] - server.times[0] < 3


def test_waits_double_and_differ(server: Server) -> None:
    server.act = lambda handler, prompt, number: handler.good() if number > 4 else handler.send(500, b"")
    waits = []
    for chance in (0.0, 0.999):
        server.asked.clear()
        server.times.clear()
        list(Endpoint(server.url, "m", backoff=0.1, chance=lambda chance=chance: chance)(["q"]))
        waits.append([b - a for a, b in zip(server.times, server.times[1:], strict=False)])
    for (long, short), want in zip(zip(*waits, strict=True), (0.1, 0.2, 0.4, 0.8), strict=True):
        assert want <= long < want + 0.1 and want / 2 <= short < want / 2 + 0.1


def test_an_endpoint_that_dies_stops_with_one_line_and_keeps_its_answers(server: Server, tmp_path: Path) -> None:
    def act(handler: Handler, prompt: str, number: int) -> None:
        with server.lock:
            fine = server.asked.total() <= 20
        handler.good() if fine else closes(handler, prompt)

    server.act = act
    run = a_run(tmp_path, server.url, tries=3, in_flight=2)
    with pytest.raises(WinnowError) as caught:
        prompts(run)
    line = str(caught.value)
    assert server.url in line and "in 3 tries" in line and "the 20 answers so far are kept" in line
    assert KEY not in line
    kept = set(answered(run))
    assert len(kept) == 20 and verify(run.store).ok
    assert not rows(run.store, "SELECT * FROM prompts")
    # It comes back: only the rest is asked, under whatever settings of patience.
    server.act = lambda handler, prompt, number: handler.good()
    server.asked.clear()
    prompts(a_run(tmp_path, server.url, tries=9, in_flight=1))
    assert server.asked == Counter(set(TEXTS) - kept)
    assert len(answered(run)) == len(TEXTS) and set(reasons(run).values()) == {None}


def test_one_prompt_that_always_fails_is_a_reject_and_no_end(server: Server, tmp_path: Path) -> None:
    """With one question at a time nobody else proves the endpoint alive: a control question does."""
    poison = TEXTS[3]
    server.act = lambda handler, prompt, number: handler.send(500, b"") if prompt == poison else handler.good()
    run = a_run(tmp_path, server.url, tries=2, in_flight=1)
    prompts(run)
    assert {text: why for text, why in reasons(run).items() if why} == {
        poison: "not judged: no answer: HTTP 500 in 2 tries"
    }
    assert server.asked == Counter(TEXTS) + Counter({poison: 1, "control": 1})


def test_what_may_pass_is_asked_again_and_drops_no_prompt_when_it_is_many(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = set(TEXTS[:5])

    def act(handler: Handler, prompt: str, number: int) -> None:
        time.sleep(1.0 if prompt in slow else 0.0)
        handler.good()

    server.act = act
    with pytest.raises(WinnowError) as caught:
        prompts(a_run(tmp_path, server.url, timeout=0.3, tries=2))
    assert "judge: 5 of 30 got no answer, such as 'a " in str(caught.value)
    assert "no answer within 0.3 s in 2 tries); raise prompts.judge.timeout" in str(caught.value)
    assert "the 25 answers so far are kept" in str(caught.value)
    run = a_run(tmp_path, server.url, timeout=20.0)
    assert not slow & set(answered(run)) and len(answered(run)) == 25
    server.asked.clear()
    slow.clear()
    prompts(run)
    assert server.asked == Counter(TEXTS[:5]) and set(reasons(run).values()) == {None}


def test_half_a_character_in_an_answer_is_replaced(server: Server, tmp_path: Path) -> None:
    odd = {TEXTS[0]: '{"clarity": 8, "specificity": 7} \ud83d', TEXTS[1]: "\ud83d"}
    error = {TEXTS[2]: b'{"error": {"message": "refused \\ud83d"}}'}

    def act(handler: Handler, prompt: str, number: int) -> None:
        if prompt in error:
            handler.send(400, error[prompt])
        else:
            handler.say(odd[prompt]) if prompt in odd else handler.good()

    server.act = act
    run = a_run(tmp_path, server.url)
    prompts(run)
    assert {text for text, why in reasons(run).items() if why} == {TEXTS[1], TEXTS[2]}
    assert answered(run)[TEXTS[0]]["reply"].endswith(" ?") and "refused ?" in str(reasons(run)[TEXTS[2]])


def test_one_prompt_that_moderation_forbids_is_a_reject_and_no_end(server: Server, tmp_path: Path) -> None:
    said = json.dumps({"error": {"message": "flagged"}}).encode()
    server.act = lambda handler, prompt, number: handler.send(403, said) if prompt == TEXTS[3] else handler.good()
    run = a_run(tmp_path, server.url)
    prompts(run)
    assert reasons(run)[TEXTS[3]] == "not judged: no answer: HTTP 403 (flagged)"


def test_an_error_that_comes_as_an_answer_says_what_it_is(server: Server, tmp_path: Path) -> None:
    server.act = lambda handler, prompt, number: handler.send(200, b'{"error": {"message": "Rate limit"}}')
    with pytest.raises(WinnowError, match=r"no chat completion \(Rate limit\) in 2 tries"):
        prompts(a_run(tmp_path, server.url, tries=2))


def test_addresses_without_a_key_are_free() -> None:
    for url in ("http://task-router:8000/v1", "https://x/openai?api-version=2024-10-21", "http://sk-judge/v1"):
        assert check_url(url) == url


def test_the_limit_of_variants_is_longer_by_whatever_name() -> None:
    judge = Judge(kind="endpoint", url="http://x/v1", model="m", options={"max_completion_tokens": 50})
    assert model(judge).body["max_completion_tokens"] == 50
    assert model(judge, 800).body["max_completion_tokens"] == 800


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (402, "HTTP 402 (no such model); see to the account of the key"),
        (401, "check the key in JUDGE_KEY"), (403, "check the key in JUDGE_KEY"),
        (404, "HTTP 404 (no such model); check prompts.judge.url and model"), (302, "HTTP 302"),
        (400, "HTTP 400 (no such model)"), (422, "HTTP 422 (no such model)"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_told_at_once_and_recorded_nowhere(
    server: Server, tmp_path: Path, status: int, said: str
) -> None:
    body = json.dumps({"error": {"message": "no such model"}}).encode()
    server.act = lambda handler, prompt, number: handler.send(status, body, {"Location": "http://127.0.0.1:9/"})
    run = a_run(tmp_path, server.url, in_flight=2)
    with pytest.raises(WinnowError) as caught:
        prompts(run)
    assert said in str(caught.value) and "the 0 answers so far are kept" in str(caught.value)
    assert server.asked.total() <= 4 and not rows(run.store, "SELECT * FROM answers")


def test_a_wait_of_hours_is_an_end(server: Server, tmp_path: Path) -> None:
    server.act = lambda handler, prompt, number: handler.send(429, b"", {"Retry-After": "7200"})
    with pytest.raises(WinnowError, match=r"asks to wait 7200 s \(HTTP 429\)"):
        prompts(a_run(tmp_path, server.url))


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(WinnowError, match=r"refused.* in 2 tries; check prompts.judge.url; the 0 answers"):
        prompts(a_run(tmp_path, f"http://127.0.0.1:{port}/v1", tries=2))


def many() -> list[str]:
    things = ("cup", "lamp", "violin", "cactus", "globe", "kettle", "spoon", "clock", "basket", "candle")
    return [f"{n} {colour} {thing}s on a table" for n in ("two", "three", "four", "five")
            for colour in ("red", "green", "blue", "white", "black") for thing in things]  # fmt: skip


def judged(store: str, url: str, source: str) -> None:
    """What the killed process runs."""
    os.environ |= {"NO_PROXY": "127.0.0.1", "JUDGE_KEY": KEY}
    home = Path(source).parent
    assert home == Path(store).parent
    prompts(a_run(home, url, many()))


def test_a_killed_run_asks_only_for_the_rest(forks: ForkServer, server: Server, tmp_path: Path) -> None:
    texts = many()
    assert len(texts) == 200
    reached = threading.Event()

    def act(handler: Handler, prompt: str, number: int) -> None:
        with server.lock:
            late = server.asked.total() > 150
        if late:
            reached.set()
            time.sleep(20)
        handler.good()

    server.act = act
    child = forks.start(
        "test_jobs_judge:judged", str(tmp_path / "store"), server.url, str(tmp_path / "p.txt"), log=tmp_path / "log"
    )
    assert reached.wait(60), (tmp_path / "log").read_text()
    os.kill(child, signal.SIGKILL)
    assert forks.wait() == -signal.SIGKILL
    # Two units of 64 are committed, not sealed; what was on its way of the third is lost.
    first = Counter(server.asked)
    assert len(list((tmp_path / "store" / "tables" / "answers").rglob("*.parquet"))) == 2
    server.act = lambda handler, prompt, number: handler.good()
    server.asked.clear()
    run = a_run(tmp_path, server.url, texts)
    prompts(run)
    again = set(server.asked)
    # Of the killed process some questions may still have waited to be taken in, so that one counts twice.
    assert len(again) == 200 - 128
    assert again | set(first) == set(texts)
    assert len(answered(run)) == 200 and verify(run.store).ok and not verify(run.store).notes


def test_answers_outlive_other_settings_and_another_judge_is_asked_anew(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path, server.url)
    strict = Run(run.store, recipes.override(run.recipe, [(["prompts", "least_clarity"], 0.9)]))
    with pytest.raises(WinnowError, match="0 of 30 prompts pass"):
        prompts(strict)
    assert server.asked == Counter(TEXTS)
    # More texts and a lower bar: only the new ones are asked.
    more = [*TEXTS[5:], "a yellow submarine below the waves", "an orange tram in a narrow street"]
    prompts(a_run(tmp_path, server.url, more))
    assert server.asked == Counter(TEXTS) + Counter(more[-2:])
    other = create(tmp_path / "other")
    prompts(Run(other, a_run(tmp_path, server.url, model="judge-2").recipe))
    assert server.asked == Counter(TEXTS) + Counter(TEXTS) + Counter(more[-2:])


def test_a_lost_part_of_answers_is_named(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path, server.url)
    strict = Run(run.store, recipes.override(run.recipe, [(["prompts", "least_clarity"], 0.9)]))
    with pytest.raises(WinnowError, match="0 of 30"):
        prompts(strict)
    part = next((run.store / "tables" / "answers").rglob("*.parquet"))
    part.unlink()
    with pytest.raises(WinnowError, match=rf"{part.name}: sealed, but missing; restore it"):
        prompts(run)


def test_the_key_is_nowhere(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that echoes it in answers, headers and errors: not in the store, on the terminal, in logs or errors."""
    caplog.set_level(logging.DEBUG)

    def act(handler: Handler, prompt: str, number: int) -> None:
        key = handler.headers["Authorization"]
        if "red" in prompt:
            handler.say(f"your key is {key}")
        elif "blue" in prompt and number == 1:
            handler.send(500, json.dumps({"error": f"bad {key}"}).encode(), {"Retry-After": "0", "X-Key": key})
        elif "white" in prompt:
            handler.send(400, json.dumps({"error": {"message": key}}).encode())
        else:
            handler.good()

    server.act = act
    run = a_run(tmp_path, server.url)
    prompts(run)
    said = [*reasons(run).values(), *(str(row) for row in answered(run).values())]
    assert sum("[key]" in str(text) for text in said) > 10  # it was echoed
    server.act = lambda handler, prompt, number: handler.send(401, handler.headers["Authorization"].encode())
    with pytest.raises(WinnowError) as caught:
        prompts(a_run(tmp_path, server.url, model="judge-2"))
    end: BaseException | None = caught.value
    while end is not None:
        said.append(str(end))
        end = end.__cause__ or end.__context__
    captured = capfd.readouterr()
    said += [captured.out, captured.err, caplog.text, repr(run.recipe), json.dumps(run.recipe.model_dump(mode="json"))]
    # zstd hides text from a search of the bytes: the tables are read above, the rest is plain.
    files = [path for path in run.store.rglob("*") if path.is_file()]
    assert len(files) > 4
    for text in [*said, *(path.read_bytes().decode("latin-1") for path in files)]:
        assert KEY not in str(text) and KEY[3:] not in str(text)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"key_env": KEY}, "not the name of an environment variable"),
        ({"key_env": "hf_AbCdEf"}, "not the name of an environment variable"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
        ({"key_env": "ODD_KEY"}, "what ODD_KEY holds cannot be a key"),
        ({"url": f"http://user:{KEY}@localhost/v1"}, "url: holds a key"),
        ({"url": f"http://localhost/v1?api_key={KEY}"}, "url: holds a key"),
        ({"url": f"file:///etc/{KEY}"}, "url: not an address"),
        ({"url": "http://localhost:port/v1"}, "url: not an address"),
        ({"api_key": KEY}, "unknown key 'prompts.judge.api_key'; allowed keys: kind, url"),
        ({"url": "http://exämple/v1"}, "url: not an address"),
        ({"url": "http://a..b/v1"}, "url: not an address"),
        ({"url": f"http://localhost/v1?code={KEY}"}, "url: holds a key"),
        ({"url": f"http://localhost/v1#{KEY}"}, "url: holds a key"),
        ({"url": f"http://localhost/{KEY}/v1"}, "url: holds a key"),
        ({"options": {"api_key": KEY}}, "options: one of them is a key, or a header"),
        ({"options": {"more": [{"extra_headers": {"Authorization": KEY}}]}}, "options: one of them is a key"),
        ({"options": {"temperature": float("nan")}}, "options: JSON cannot hold them"),
        ({"timeout": 1e12}, "prompts.judge.timeout is 1000000000000.0"),
        ({"options": {"stream": True}}, "prompts.judge.options.stream: is not free to choose"),
        ({"url": None}, "'endpoint' needs prompts.judge.url"),
        ({"model": ""}, "'endpoint' needs prompts.judge.model"),
        ({"kind": "oracle"}, "'rules', 'endpoint' or 'local'"),
    ],
)
def test_wrong_settings_say_so_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("ODD_KEY", f"{KEY}\r\nX-Other: 1")
    with pytest.raises(WinnowError) as caught:
        prompts(a_run(tmp_path, "http://127.0.0.1:9/v1", **judge))
    assert said in str(caught.value) and KEY not in str(caught.value)


def test_the_key_is_not_in_a_traceback(server: Server, tmp_path: Path, winnow: Callable[..., Any]) -> None:
    server.act = lambda handler, prompt, number: handler.send(401, handler.headers["Authorization"].encode())
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    judge = json.dumps({"kind": "endpoint", "url": server.url, "model": "m", "key_env": "JUDGE_KEY"})
    said = winnow("prompts", "--store", tmp_path / "s", "--source", tmp_path / "p.txt", "--set",
                  f"prompts.judge={judge}", "--debug")  # fmt: skip
    assert said.status == 2 and "Traceback" in said.err and "HTTP 401; check the key in JUDGE_KEY" in said.err
    assert KEY not in said.err + said.out and server.seen[0][1] == f"Bearer {KEY}"


class Mortal:
    """A model that ends with an error after some answers."""

    name, revision = "mortal", "1"

    def __init__(self, lives: int) -> None:
        self.lives, self.asked = lives, []

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        for i, asked in reversed(list(enumerate(questions))):  # in any order
            if len(self.asked) == self.lives:
                raise KeyboardInterrupt
            self.asked.append(asked)
            yield i, Reply('{"clarity": 5, "specificity": 5}')


def test_an_error_half_way_keeps_what_was_answered(tmp_path: Path) -> None:
    run = Run(create(tmp_path / "store"), recipes.load("embedded"))
    task = Task("judge", str.upper, grades)
    texts = [f"text {i}" for i in range(150)]
    first, second = Mortal(100), Mortal(1000)
    with pytest.raises(KeyboardInterrupt):
        answers(run, task, first, texts)
    assert len(rows(run.store, "SELECT * FROM answers")) == 100 and not verify(run.store).notes
    made = answers(run, task, second, texts)
    assert [row["text"] for row in made] == texts
    assert len(second.asked) == 50 and {*first.asked, *second.asked} == {text.upper() for text in texts}
    # Another question is another judge.
    assert len(answers(run, Task("judge", str.title, grades), third := Mortal(1000), texts)) == 150
    assert len(third.asked) == 150


def test_two_runs_that_asked_the_same_do_not_block_the_next(tmp_path: Path) -> None:
    """Both were killed before they sealed: one answer to each question counts, and no part is lost."""
    task = Task("judge", str.upper, grades)
    texts = [f"text {i}" for i in range(30)]
    stores = [create(tmp_path / name) for name in ("one", "two")]
    for store, some in zip(stores, (texts[:20], texts[10:25]), strict=True):
        answers(Run(store, recipes.load("embedded")), task, Mortal(1000), some)
    one, two = (store / "tables" / "answers" for store in stores)
    for path in two.rglob("*.parquet"):
        path.rename(one / path.relative_to(two).parent / path.name)
    for path in (stores[0] / "snapshots").iterdir():
        path.unlink()
    run, last = Run(stores[0], recipes.load("embedded")), Mortal(1000)
    made = answers(run, task, last, texts)
    assert [row["text"] for row in made] == texts and len(last.asked) in (10, 15)
    assert verify(run.store).ok and len(rows(run.store, "SELECT * FROM answers")) == 30


@given(st.text())
def test_a_prompt_cannot_break_out_of_its_quotes(text: str) -> None:
    asked = question(text)
    head, tail = QUESTION.format(prompt="\0").split("\0")
    assert asked.startswith(head) and asked.endswith(tail)
    inside = asked[len(head) : len(asked) - len(tail)]
    assert inside == quoted(text) and json.loads(inside) == text
    assert inside.splitlines() == [inside]
    assert not re.search(r"[<>\[\]]", inside)  # no <|im_end|>, no [INST]
    assert not re.search(r'(?<!\\)(?:\\\\)*"', inside[1:-1])


@pytest.mark.parametrize(
    "reply",
    [
        '{"clarity": 7, "specificity": 3}',
        '```json\n{"specificity": 3, "clarity": 7}\n```',
        'Sure! {"clarity": 7.0, "specificity": 3, "why": "clear {enough}"} I hope this helps.',
        '<think>{"clarity": 1, "specificity": 1}? No.</think>{"clarity": 7, "specificity": 3}',
        '{not json} {"clarity": 7, "specificity": 3}',
    ],
)
def test_grades_are_read_from_what_models_say(reply: str) -> None:
    assert grades(reply) == {"clarity": 7, "specificity": 3}


@given(st.text() | st.integers().map(str) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["clarity", "specificity", "x"]), inner),
).map(json.dumps))  # fmt: skip
def test_whatever_is_said_is_two_grades_or_a_reason(reply: str) -> None:
    try:
        found = grades(reply)
    except ValueError as error:
        assert str(error)
    else:
        assert set(found) == {"clarity", "specificity"}
        assert all(type(grade) is int and 1 <= grade <= 10 for grade in found.values())
