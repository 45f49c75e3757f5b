"""The Hub, played by a small server: what it gives is used, and each way to be refused is one line of its own."""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs import hub, models
from jobs.encoders import encoder
from jobs.latents import Latents
from jobs.pretrained import Pretrained
from jobs.scorers import scorer
from schemas.errors import WinnowError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EVERYTHING = (*hub.SETTINGS, *hub.WEIGHTS)
TOKEN = "hf_" + "SecretOfMine" * 3


@dataclass
class Hub:
    """Files by repository; what is refused, by path."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusal: tuple[int, dict[str, str]] | None = None
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, as the Hub answers."""
        self.asked.append(path)
        if self.refusal:
            return *self.refusal, b"{}"
        parts = path.split("?")[0].strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = self.files[repo]
        if parts[0] == "api":
            said = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            if "tree" in parts:
                tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            return 200, {"Content-Type": "application/json"}, json.dumps(said).encode()
        name = "/".join(parts[4:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        return 200, {"ETag": f'"{hash(files[name])}"', "X-Repo-Commit": COMMIT}, files[name]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    played = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = played.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        played.url = f"http://127.0.0.1:{listening.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", played.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield played
        listening.shutdown()
        thread.join()


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_file_and_a_commit(server: Hub) -> None:
    server.files["org/name"] = {"a.bin": b"some bytes", "b.bin": b"others"}
    assert hub.revision("org/name", "x:") == COMMIT[:16]
    path = hub.file("org/name", "a.bin", "x:")
    assert path.read_bytes() == b"some bytes" and COMMIT in path.parts


def test_a_folder_holds_what_was_asked_for(server: Hub) -> None:
    unwanted = dict.fromkeys(("pytorch_model.bin", "open_clip_model.safetensors", "code.py"), b"unwanted")
    server.files["org/name"] = {"config.json": b"{}", "model.safetensors": b"s", "vocab.txt": b"a"} | unwanted
    folder = hub.folder("org/name", EVERYTHING, "x:")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]


REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, "", r"the Hub's repository is gated; accept its terms"),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, "", r"the Hub has no such repository, or it is private"),
    "private": (401, {"X-Error-Message": "Invalid username or password."}, "", r"no such repository, or it is private"),
    "wrong token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, TOKEN,
                    r"the Hub refuses the token; log in again with 'hf auth login', or unset HF_TOKEN"),
    "old token": (401, {"X-Error-Message": "Invalid username or password."}, TOKEN, r"the Hub refuses the token"),
    "forbidden": (403, {"X-Error-Message": "no"}, TOKEN, r"the Hub forbids access; check what the token may read"),
    "broken": (500, {}, "", r"the Hub answers with status 500; try again later"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("verb", ["revision", "file", "folder"])
def test_each_refusal_is_a_line_of_its_own(
    server: Hub, case: str, verb: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    status, headers, token, line = REFUSALS[case]
    server.refusal = (status, headers)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries a broken server again
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    call = {
        "revision": lambda: hub.revision("org/name", "scorer 'x':"),
        "file": lambda: hub.file("org/name", "a.bin", "scorer 'x':"),
        "folder": lambda: hub.folder("org/name", EVERYTHING, "scorer 'x':"),
    }[verb]
    with pytest.raises(WinnowError, match=rf"^scorer 'x': {line}" if line.startswith("the") else line) as said:
        call()
    assert "\n" not in str(said.value) and len(str(said.value)) < 300
    assert TOKEN not in str(said.value) and TOKEN not in caplog.text
    assert server.asked


def test_a_missing_file_is_named(server: Hub) -> None:
    server.files["org/name"] = {"b.bin": b"others"}
    with pytest.raises(WinnowError, match=r"^scorer 'x': the Hub's repository has no a\.bin; check the name$"):
        hub.file("org/name", "a.bin", "scorer 'x':")


@pytest.mark.parametrize("verb", ["revision", "file", "folder"])
def test_no_network_is_told_without_the_token(
    server: Hub, verb: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries again
    call = {
        "revision": lambda: hub.revision("org/name", "x:"),
        "file": lambda: hub.file("org/name", "a.bin", "x:"),
        "folder": lambda: hub.folder("org/name", EVERYTHING, "x:"),
    }[verb]
    with pytest.raises(WinnowError, match=r"^x: the Hub cannot be reached \(.+\); give a local folder$") as said:
        call()
    assert "\n" not in str(said.value) and "Secret" not in str(said.value)
    assert capfd.readouterr() == ("", "")  # no word of each attempt


def test_a_token_in_an_error_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-in-the-usual-form")
    with pytest.raises(WinnowError) as said, hub.refusals("x:"):
        raise RuntimeError(f"Bearer not-in-the-usual-form, {TOKEN}")
    assert "usual" not in str(said.value) and TOKEN not in str(said.value) and "Bearer …, …" in str(said.value)


def test_without_a_network_the_cache_says_its_commit(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["org/name"] = {"a.bin": b"some bytes"}
    hub.file("org/name", "a.bin", "x:")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    assert hub.revision("org/name", "x:") == COMMIT[:16]
    assert hub.file("org/name", "a.bin", "x:").read_bytes() == b"some bytes"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.refusal = (403, {"X-Error-Code": "GatedRepo"})  # an answer is an answer
    with pytest.raises(WinnowError, match="gated"):
        hub.revision("org/name", "x:")


def test_pipelines_are_refused_by_the_same_lines(server: Hub) -> None:
    with pytest.raises(WinnowError, match=r"^model 'org/none': no such folder, and the Hub has no such repository"):
        models.revision("org/none")
    server.files["org/name"] = {}
    assert models.revision("org/name") == COMMIT[:16]


def test_scorers_and_encoders_are_refused_by_the_same_lines(server: Hub) -> None:
    server.refusal = (403, {"X-Error-Code": "GatedRepo"})
    for name in ("hps-v2.1", "image-reward", "pickscore", "aesthetic-v2"):
        with pytest.raises(WinnowError, match=rf"^scorer '{name}': the Hub's repository is gated"):
            scorer(name)
    for name in ("clip:org/name", "siglip:org/name", "dinov2:org/name"):
        with pytest.raises(WinnowError, match=rf"^encoder '{name}': the Hub's repository is gated"):
            encoder(name)
    for name in ("ViT-L-14/openai", "hf-hub:org/name"):
        with pytest.raises(WinnowError, match=rf"^open_clip model '{name}': the Hub's repository is gated"):
            encoder(f"open_clip:{name}")
    with pytest.raises(WinnowError, match=r"^autoencoder 'org/name': the Hub's repository is gated"):
        encoder("vae:org/name")


def test_the_revision_of_an_open_clip_tag_is_its_commit(server: Hub) -> None:
    server.files["timm/vit_large_patch14_clip_224.openai"] = {}
    server.files["laion/CLIP-ViT-L-14-laion2B-s32B-b82K"] = {}
    for name in ("ViT-L-14/openai", "ViT-L-14/laion2b_s32b_b82k"):
        assert scorer(f"open_clip:{name}").revision == encoder(f"open_clip:{name}").revision == COMMIT[:16]
    assert {path.split("/models/")[1] for path in server.asked} == set(server.files)
    with pytest.raises(WinnowError, match=r"'ViT-L-14/opena': unknown; there are openai, .*write 'model/tag'"):
        scorer("open_clip:ViT-L-14/opena")
    with pytest.raises(WinnowError, match=r"'ViT-L/openai': unknown; there is no model 'ViT-L'"):
        scorer("open_clip:ViT-L/openai")


def test_a_checkpoint_of_the_hub_is_fetched_once_it_is_needed(server: Hub) -> None:
    server.files["xswu/HPSv2"] = {"HPS_v2.1_compressed.pt": b"no checkpoint"}
    found = scorer("hps-v2.1")
    assert found.revision == COMMIT[:16] and not [path for path in server.asked if "resolve" in path]
    weights = hub.Weights("scorer 'hps-v2.1'", "", "xswu/HPSv2", "HPS_v2.1_compressed.pt")
    with pytest.raises(WinnowError, match=r"scorer 'hps-v2\.1': .*HPS_v2\.1_compressed\.pt cannot be read"):
        weights.tensors()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bare", [False, True])
def test_of_a_pipeline_the_autoencoder_alone_is_downloaded(server: Hub, stable_diffusion: Path, bare: bool) -> None:
    server.files["org/sd"] = tree(stable_diffusion / "vae" if bare else stable_diffusion)
    latents = Latents("org/sd")
    assert latents.revision == COMMIT[:16]
    assert latents.vae.config.scaling_factor == 0.18215
    fetched = {path.split("/main/")[-1].split(f"/{COMMIT}/")[-1] for path in server.asked if "/resolve/" in path}
    vae = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert fetched == (vae if bare else {"model_index.json", *(f"vae/{name}" for name in vae)})


def test_a_model_of_transformers_is_downloaded_without_pickles(server: Hub, tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    model.save_pretrained(tmp_path / "eye")
    server.files["org/eye"] = tree(tmp_path / "eye") | {"pytorch_model.bin": b"pickle"}
    loaded = Pretrained("encoder 'x'", "org/eye").model(Dinov2Model)
    assert (loaded.layernorm.weight == model.layernorm.weight).all()
    assert not [path for path in server.asked if path.endswith(".bin")]


def test_of_a_processor_no_weights_are_downloaded(server: Hub) -> None:
    from jobs.scorers.image_reward import TOKENIZER
    from jobs.scorers.pickscore import MODEL, PROCESSOR, PickScore

    everything = {name: b"{}" for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "vocab.txt",
                                           "model.safetensors", "open_clip_model.safetensors", "flax_model.msgpack",
                                           "pytorch_model.bin")}  # fmt: skip
    server.files |= {name: everything for name in (MODEL, PROCESSOR, TOKENIZER)}
    judge = PickScore()
    folders = judge.weights.folder, judge.reading.folder, Pretrained("x", TOKENIZER, weights=False).folder
    settings = {"config.json", "tokenizer.json", "preprocessor_config.json", "vocab.txt"}
    assert [{path.name for path in folder.iterdir()} for folder in folders] == [
        settings | {"model.safetensors"}, settings, settings,
    ]  # fmt: skip
    assert judge.revision == f"{COMMIT[:16]}-{COMMIT[:16]}"
