"""Sources of prompts: folders, columns, categories, and datasets of a Hub that a server in the test plays."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.sources import label, read, rows
from schemas.errors import WinnowError

HOME = Path(__file__).parent.parent
TEXTS = ["a red fox in the deep snow", "two green birds on a wire", None, "an old boat"]


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_a_folder_of_parquet_files_is_read_in_order_of_their_names(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "b.parquet", Text=["third"], kind=["x"])
    parquet(tmp_path / "d" / "a.parquet", n=[1, 2], Text=pa.array(["first", None], pa.large_string()), kind=[1, None])
    (tmp_path / "d" / "notes.txt").write_text("not me")
    assert rows(str(tmp_path / "d"), "text", "Kind") == [("first", "1"), ("", ""), ("third", "x")]
    assert read(str(tmp_path / "d"), limit=1) == ["first"] and label(str(tmp_path / "d")) == "d"
    (tmp_path / "none").mkdir()
    with pytest.raises(WinnowError, match=r"the folder holds no .parquet file"):
        read(str(tmp_path / "none"))


def test_categories_come_with_their_texts(tmp_path: Path) -> None:
    want = [("a cat", "animals"), ("a hat", ""), ("a bat", "animals")]
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\n" + "".join(f"{text}\t{kind}\n" for text, kind in want))
    (tmp_path / "p.csv").write_text("category,prompt\n" + "".join(f"{kind},{text}\n" for text, kind in want))
    lines = [json.dumps({"prompt": text, "category": kind or None}) for text, kind in want]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    for name in ("p.tsv", "p.csv", "p.jsonl"):
        assert rows(str(tmp_path / name), "text", "category") == want, name
        assert rows(str(tmp_path / name), "text") == [(text, "") for text, _ in want]
        with pytest.raises(WinnowError, match="'kind'.*set prompts.balance.column to one of"):
            rows(str(tmp_path / name), "text", "kind")
    (tmp_path / "p.txt").write_text("a cat\n")
    for source in (str(tmp_path / "p.txt"), "embedded"):
        with pytest.raises(WinnowError, match=r"has no columns, so no 'category'; use prompts.balance.rules"):
            rows(source, "text", "category")


def test_a_column_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", text=[1, 2])
    with pytest.raises(WinnowError, match="column 'text' holds int64, not text; set prompts.column"):
        read(str(path))


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as reading a public, a gated and a missing dataset takes."""

    protocol_version = "HTTP/1.1"
    commit = "a" * 40
    files: dict[str, bytes] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        entry = {"type": "file", "oid": "b" * 40}
        if path.startswith("/api/datasets/org/gated") or path.startswith("/datasets/org/gated"):
            self.send({"error": "Access to dataset org/gated is restricted."}, 403, {"X-Error-Code": "GatedRepo"})
        elif path == f"/api/datasets/org/name/tree/{self.commit}":
            self.send([{"type": "directory", "path": "data", "oid": "c" * 40}])
        elif path == f"/api/datasets/org/name/tree/{self.commit}/data":
            self.send([entry | {"path": name, "size": len(data)} for name, data in self.files.items()])
        elif path.startswith("/api/datasets/org/name"):
            names = [{"rfilename": name} for name in self.files]
            self.send({"id": "org/name", "sha": self.commit, "siblings": names, "tags": [], "private": False})
        elif (name := path.partition(f"/resolve/{self.commit}/")[2]) in self.files:
            self.file(self.files[name])
        else:
            known = "org/name" in path
            self.send({"error": "not here"}, 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        entry = {"type": "file", "oid": "b" * 40}
        self.send([entry | {"path": name, "size": len(data)} for name, data in self.files.items()])

    def file(self, data: bytes) -> None:
        headers = {"ETag": '"e"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            data = data[int(first) : end + 1]
        self.send(data, 206 if wanted else 200, headers)

    def send(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    for split, texts in (("train", TEXTS), ("test", ["a cat in a hat"])):
        file = io.BytesIO()
        pq.write_table(pa.table({"Prompt": texts, "kind": ["x"] * len(texts), "n": range(len(texts))}), file)
        Hub.files[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


ASK = """
import json, sys
from jobs.sources import rows
from schemas.errors import WinnowError
for question in json.loads(sys.argv[1]):
    try:
        print(json.dumps(rows(*question)))
    except WinnowError as error:
        print(error)
"""


def ask(tmp_path: Path, endpoint: str, *questions: list[Any], offline: bool = False) -> list[str]:
    """The answers of a process that knows the Hub at this address only."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(HOME)}
    environment |= {"HF_HUB_OFFLINE": "1" if offline else "0"}
    said = subprocess.run([sys.executable, "-c", ASK, json.dumps(questions)], env=environment, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()


def test_datasets_of_the_hub(hub: str, tmp_path: Path) -> None:
    said = ask(
        tmp_path, hub, ["hub:org/name", "text", "kind"], ["hub:org/name@test", "prompt"], ["hub:org/name", "n"],
        ["hub:org/name", "text", "sort"], ["hub:org/name@valid"], ["hub:org/none"], ["hub:org/gated"],
        ["hub:org/name", "text", None, 2], ["hub:a/b/c"],
    )  # fmt: skip
    assert json.loads(said[0]) == [[text or "", "x"] for text in TEXTS]
    assert json.loads(said[1]) == [["a cat in a hat", ""]]
    assert "'hub:org/name': row 0 of column 'n' holds int, not text; set prompts.column" in said[2]
    assert "'hub:org/name': no column 'sort'; set prompts.balance.column to one of Prompt, kind, n" in said[3]
    assert "'hub:org/name@valid': has no split 'valid'" in said[4] and "train" in said[4]
    assert "'hub:org/none': no such dataset on the Hub, or a private one; check the name" in said[5]
    assert "'hub:org/gated': is gated; ask for access" in said[6]
    assert json.loads(said[7]) == [[text, ""] for text in TEXTS[:2]]
    assert "'hub:a/b/c': no dataset's name; write hub:org/name" in said[8]


def test_no_network(tmp_path: Path) -> None:
    [line] = ask(tmp_path, "http://127.0.0.1:9", ["hub:org/name"], offline=True)
    assert "'hub:org/name': the Hub cannot be reached" in line and "a local folder of Parquet files" in line


def test_a_table_with_torn_rows_is_named(tmp_path: Path) -> None:
    """Where a text would be cut, or swallow those after it."""
    for name, text, said in (
        ("a.csv", "text,cat\na red cube, a blue ball,shapes\n", "row 2: has more fields than the 2 .*comma"),
        ("a.csv", 'text\n"a red cube\na dog\na cat\n', "row 2: a quote begins there and does not end"),
        ("a.tsv", 'text\tcat\none\tY\n"open sign\tZ\nother\tW\n', "row 3: a quote begins there"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(WinnowError, match=rf"{name} {said}"):
            read(str(tmp_path / name))
    (tmp_path / "b.csv").write_text('\n\ntext,cat\n"one, ""two""\nthree",x\n')
    assert read(str(tmp_path / "b.csv")) == ['one, "two"\nthree']


def test_keys_are_found_as_columns_are(tmp_path: Path) -> None:
    lines = ({"Text": "one", "Cat": 1}, {"text": None, "cat": "x"}, {"Prompt": "two", "cat": None})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rows(str(tmp_path / "a.jsonl"), category="cat") == [("one", "1"), ("", "x"), ("two", "")]


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    torn = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": torn}), tmp_path / "torn.parquet")
    for source in (tmp_path / "twice.parquet", tmp_path / "torn.parquet", "~nobody-here/x.txt", "a" * 5000 + ".txt"):
        with pytest.raises(WinnowError, match="cannot be read"):
            read(str(source))
