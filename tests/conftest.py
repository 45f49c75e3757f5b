"""What several test modules share: a tiny finished run of the embedded world, and random models of the usual shapes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from endpoint import KEY, Server

from storage.query import user_query

# One thread everywhere: floats stay equal between runs, and two cores are not fought over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Overrides of the recipe embedded-fast: minutes become seconds, every stage stays.
TINY = {
    "threads": 1,
    "generate.prompts": 12,
    "generate.steps": 2,
    "generate.batch": 24,
    "generate.retries": 8,
    "reference.prompts": 12,
    "embed.batch": 24,
    "score.batch": 24,
    "train.steps": 4,
    "train.batch": 8,
    "train.checkpoint": 2,
    "evaluate.prompts": 8,
    "evaluate.images_per_prompt": 3,
    "evaluate.resamples": 10,
    "guard.diversity_floor": 0.0,
}


def sets(changes: dict[str, Any]) -> list[tuple[list[str], Any]]:
    """Dotted keys as ``jobs.recipe.override`` takes them."""
    return [(key.split("."), value) for key, value in changes.items()]


def rows(store: Path, sql: str) -> list[dict[str, Any]]:
    return user_query(store, sql).to_pylist()


def files(store: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file of a store."""
    found = (path for path in sorted(store.rglob("*")) if path.is_file())
    return {path.relative_to(store).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@dataclass(frozen=True)
class World:
    """A finished run: its store, its recipe, and the Run of each arm."""

    store: Path
    recipe: Any
    runs: dict[str, Any]

    def rows(self, sql: str) -> list[dict[str, Any]]:
        return rows(self.store, sql)

    def table(self, sql: str) -> pa.Table:
        return user_query(self.store, sql)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Both arms of the embedded default over two rounds. Tests read it, or run again what ran: they add nothing."""
    import torch

    from jobs import recipe as recipes
    from jobs.round import loop
    from jobs.run import Run
    from storage.layout import create

    torch.set_num_threads(1)
    recipe = recipes.override(recipes.load("embedded-fast"), sets(TINY))
    store = create(tmp_path_factory.mktemp("world") / "store")
    runs = {arm: Run(store, recipe.for_arm(arm), 1, arm) for arm in recipe.arms}
    for run in runs.values():
        loop(run)
    return World(store, recipe, runs)


WORDS = ["a red fox in the snow", "two green birds on a wire", "an old boat under a bridge", "the blue house"]


def build_stable_diffusion(folder: Path, **scheduler: Any) -> Path:
    """A Stable Diffusion 1.x pipeline of random weights: ε-prediction, PNDM, 4 latent channels, 32×32 pixels."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from jobs.world.generator import word_tokenizer

    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=32, scaling_factor=0.18215,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
            set_alpha_to_one=False, **scheduler,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model of random weights, as ``local-dir:`` reads it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "clip"
    folder.mkdir()
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(16, vision, text)
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 16}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


SERVER = """
import json, os, signal, sys
import importlib
import conftest, pytest, torch, duckdb, faiss, datasets, open_clip
import jobs.round, jobs.clip, jobs.latents, jobs.training.loop, jobs.recipe, jobs.demo
import jobs.world.judge, jobs.world.reader
from diffusers import DiffusionPipeline, StableDiffusionPipeline, AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
print("ready", flush=True)
for line in iter(sys.stdin.readline, ''):
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            torch.set_num_threads(1)
            left = job["events"]
            def count(event, args):
                global left
                if left and event in ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "duckdb.connect"):
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
            if left:
                sys.addaudithook(count)
            module, name = job["call"].split(":")
            getattr(importlib.import_module(module), name)(*job["args"])
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    print(pid, flush=True)
    sys.stdin.readline()  # not reaped before it is asked for: until then no other process can get its pid
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class ForkServer:
    """A process that has imported everything; each job runs in a fork of it, which may be killed at will."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def start(self, call: str, *args: str, log: Path, events: int = 0) -> int:
        """Run ``module:function`` with these arguments; ``events``: SIGKILL at that many file operations. Its pid."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"call": call, "args": args, "log": str(log), "events": events}) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The exit status of the job that was started last; -9 where it was killed."""
        assert self.process.stdin
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A language model behind an endpoint, and its key in JUDGE_KEY."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on standard error of what the user can mend."""
        assert self.status == 2, (self.status, self.err)
        assert self.err.count("\n") == 1 and self.err.startswith("winnow: "), self.err
        return self.err.strip()


@pytest.fixture
def winnow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line in this process: ``winnow("sql", "SELECT 1", "--store", store)``."""
    from jobs.cli import main

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            status: object = 0
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        assert isinstance(status, int), status
        return Said(status, said.out, said.err)

    return call
