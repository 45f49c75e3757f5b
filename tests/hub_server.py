"""A Hub for tests: repositories with commits, branches, tags and large files, behind the endpoints that the Hub's own
client asks, which can refuse any request, before or after it did what was asked."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "OnlyForTests" * 3
LARGE = (".parquet", ".safetensors", ".png", ".bin")
REFUSED = 501  # a status that the client does not try again


@dataclass(frozen=True)
class Blob:
    """A file of a commit; ``lfs``: stored apart, and known by its SHA-256."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        data = self.data
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


Tree = dict[str, Blob]


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted((n, b.oid) for n, b in tree.items())}".encode()).hexdigest()
        self.commits[oid] = tree
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound")
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {name: blob.data for name, blob in self.commits[self.resolve(revision)].items()}


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", said: str = "", **more: str) -> None:
        super().__init__(status, code, said)
        self.status, self.code, self.more = status, code, {"error": said or code} | more


@dataclass
class Answer:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def told(value: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


class Hub(ThreadingHTTPServer):
    """``refuse``: whether the request of this number (from 1) and path is refused, "before" or "after" it is done."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.uploaded = 0
        self.refuse: Callable[[int, str], str | None] = lambda number, path: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def repo(self, name: str, headers: Any) -> Repo:
        if name not in self.repos:
            raise Refusal(404, "RepoNotFound")
        if self.repos[name].private and headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "RepoNotFound")
        return self.repos[name]

    def answer(self, method: str, target: str, body: bytes, headers: Any) -> Answer:
        parts, query = urlsplit(target), parse_qs(urlsplit(target).query)
        path = parts.path
        writes = method not in ("GET", "HEAD") and not path.startswith("/lfs/")
        if writes and headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, said="Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return validate(json.loads(body))
        if found := re.fullmatch(r"/api/((?:model|dataset)s)/([^/]+/[^/]+)(?:/(.*))?", path):
            kind, name, rest = found.groups()
            repo = self.repo(f"{kind}/{name}", headers)
            verb, _, tail = (rest or "").partition("/")
            if (method, verb) in API:
                return API[method, verb](repo, unquote(tail), body, query, name)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            repo = self.repo(f"{(found[1] or 'models/')}{found[2]}", headers)
            return self.batch(repo, f"{(found[1] or 'models/')}{found[2]}", json.loads(body))
        if found := re.fullmatch(r"/lfs/(upload|verify)/(\w+/[^/]+/[^/]+)/(\w{64})", path):
            return self.large(*found.groups(), body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.repo(f"{(found[1] or 'models/')}{found[2]}", headers)
            return resolved(repo, unquote(found[3]), unquote(found[4]), headers)
        raise Refusal(404, said=f"no such endpoint: {method} {path}")

    def create(self, asked: dict[str, Any]) -> Answer:
        name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
        url = f"{self.url}/{name.removeprefix('models/')}"
        if name in self.repos:
            raise Refusal(409, said="You already created this repo", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", {".gitattributes": Blob(b"*.parquet filter=lfs\n", False)})
        return told({"url": url})

    def batch(self, repo: Repo, name: str, asked: dict[str, Any]) -> Answer:
        objects = []
        for one in asked["objects"]:
            links = {
                "upload": {"href": f"{self.url}/lfs/upload/{name}/{one['oid']}"},
                "verify": {"href": f"{self.url}/lfs/verify/{name}/{one['oid']}"},
            }
            objects.append(one | ({} if one["oid"] in repo.large else {"actions": links}))
        return told({"transfer": "basic", "objects": objects})

    def large(self, verb: str, name: str, oid: str, body: bytes) -> Answer:
        repo = self.repos[name]
        if verb == "verify":
            if len(repo.large.get(oid, b"")) != json.loads(body)["size"]:
                raise Refusal(404, said="no such object")
            return told({})
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, said="the content has another SHA-256")
        self.uploaded += len(body)
        repo.large[oid] = body
        return Answer(b"")

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def validate(asked: dict[str, Any]) -> Answer:
    """What the Hub refuses of a card: no YAML between two rules at its head, or a licence that is no name."""
    found = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
    head = yaml.safe_load(found[1]) if found else None
    errors = []
    if not isinstance(head, dict):
        errors.append({"message": "no metadata"})
    elif not re.fullmatch(r"[a-z0-9.-]+", str(head.get("license", "other"))):
        errors.append({"message": '"license" must be one of those that the Hub knows'})
    return told({"errors": errors, "warnings": []}, 400 if errors else 200)


def info(repo: Repo, tail: str, body: bytes, query: Any, name: str) -> Answer:
    sha = repo.resolve(tail or "main")
    names = [{"rfilename": path} for path in repo.commits[sha]]
    return told({"id": name, "sha": sha, "private": repo.private, "siblings": names})


def refs(repo: Repo, *_: Any) -> Answer:
    def listed(kind: str, known: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in known.items()]

    return told({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})


def entry(path: str, blob: Blob) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    return found | ({"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {})


def tree(repo: Repo, tail: str, body: bytes, query: dict[str, list[str]], name: str) -> Answer:
    revision, _, folder = tail.partition("/")
    files = repo.commits[repo.resolve(revision)]
    lead = f"{folder}/" if folder else ""
    below = {path: blob for path, blob in files.items() if path.startswith(lead)}
    if folder and not below:
        raise Refusal(404, "EntryNotFound")
    folders = {path[: i + len(lead)] for path in below for i, c in enumerate(path[len(lead) :]) if c == "/"}
    found = [entry(path, blob) for path, blob in below.items()]
    found += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
    if query.get("recursive", ["false"])[0].lower() != "true":
        found = [one for one in found if "/" not in one["path"][len(lead) :]]
    return told(sorted(found, key=lambda one: one["path"]))


def paths_info(repo: Repo, tail: str, body: bytes, query: Any, name: str) -> Answer:
    files = repo.commits[repo.resolve(tail)]
    found = []
    for path in parse_qs(body.decode())["paths"]:
        if path in files:
            found.append(entry(path, files[path]))
        elif any(known.startswith(f"{path}/") for known in files):
            found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
    return told(found)


def preupload(repo: Repo, tail: str, body: bytes, query: Any, name: str) -> Answer:
    files = repo.commits[repo.resolve(tail)]
    answers = []
    for one in json.loads(body)["files"]:
        large, known = one["path"].endswith(LARGE), files.get(one["path"])
        same = {"oid": known.sha256 if known.lfs else known.oid} if known else {}
        answers.append({"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | same)
    return told({"files": answers})


def commit(repo: Repo, tail: str, body: bytes, query: Any, name: str) -> Answer:
    import base64

    head, *lines = [json.loads(line) for line in body.splitlines()]
    at = repo.resolve(tail)
    if head["value"].get("parentCommit", at) != at:
        raise Refusal(412, said="A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[at])
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in repo.large:
                raise Refusal(400, said=f"{value['path']}: no such object")
            files[value["path"]] = Blob(repo.large[value["oid"]], True)
        else:
            assert line["key"] == "deletedFile", line
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
    oid = repo.commit(tail, files)
    return told({"commitUrl": f"/{name}/commit/{oid}", "commitOid": oid})


def make_branch(repo: Repo, tail: str, body: bytes, query: Any, name: str) -> Answer:
    if tail in repo.branches:
        raise Refusal(409, said="Reference already exists")
    repo.branches[tail] = repo.resolve(json.loads(body).get("startingPoint", "main"))
    return told({})


def drop_branch(repo: Repo, tail: str, body: bytes, query: Any, name: str) -> Answer:
    if repo.branches.pop(tail, None) is None:
        raise Refusal(404, "RevisionNotFound")
    return told({})


def make_tag(repo: Repo, tail: str, body: bytes, query: Any, name: str) -> Answer:
    label = json.loads(body)["tag"]
    if label in repo.tags:
        raise Refusal(409, said="Tag reference exists already")
    repo.tags[label] = repo.resolve(tail)
    return told({})


API: dict[tuple[str, str], Callable[..., Answer]] = {
    ("GET", ""): info, ("GET", "revision"): info, ("GET", "refs"): refs, ("GET", "tree"): tree,
    ("POST", "paths-info"): paths_info, ("POST", "preupload"): preupload, ("POST", "commit"): commit,
    ("POST", "branch"): make_branch, ("DELETE", "branch"): drop_branch, ("POST", "tag"): make_tag,
}  # fmt: skip


def resolved(repo: Repo, revision: str, path: str, headers: Any) -> Answer:
    """A file, or the range of it that is asked for."""
    at = repo.resolve(revision)
    said = {"X-Repo-Commit": at}
    if path not in repo.commits[at]:
        return Answer(b"", 404, said | {"X-Error-Code": "EntryNotFound"})
    blob = repo.commits[at][path]
    said |= {"ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"', "Accept-Ranges": "bytes"}
    if found := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or ""):
        first, last = int(found[1]), min(int(found[2] or len(blob.data)), len(blob.data) - 1)
        said["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        return Answer(blob.data[first : last + 1], 206, said)
    return Answer(blob.data, 200, said)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"".join(self.chunks())
        hub = self.server
        with hub.lock:
            hub.asked.append(f"{self.command} {self.path}")
            when = hub.refuse(len(hub.asked), self.path)
            answer = Answer(b"{}", REFUSED)
            if when != "before":
                try:
                    done = hub.answer(self.command, self.path, body, self.headers)
                except Refusal as refusal:
                    done = told(refusal.more, refusal.status)
                    done.headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                answer = answer if when else done
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *_: Any) -> None:
        pass
