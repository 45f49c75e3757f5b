"""Text encoders, against the same models used by hand, text by text."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, rows, sets

from jobs import recipe as recipes
from jobs.language.texts import text_encoder
from jobs.prompts import prompts
from jobs.run import Run
from schemas.errors import WinnowError
from storage.layout import create

TEXTS = [*WORDS, "bridge", "a bird in the snow under the old blue bridge in the snow", "red"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "bert"
    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=24, initializer_range=0.5,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_mean_pooling_is_the_mean_over_the_tokens_of_the_text_alone(bert: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    want = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert len(hidden) == len(text.split())
        mean = sum(token.double() for token in hidden) / len(hidden)
        want.append((mean / mean.norm()).numpy())
    made = text_encoder(f"sentence:{bert}").encode(TEXTS)
    np.testing.assert_allclose(made, want, atol=1e-5)
    many = text_encoder(f"sentence:{bert}").encode(TEXTS * 30)  # more than a batch
    np.testing.assert_allclose(many, np.tile(want, (30, 1)), atol=1e-5)
    assert np.isfinite(text_encoder(f"sentence:{bert}").encode(["red " * 500])).all()  # cut at the model's places


def test_the_text_tower_of_open_clip(clip_folder: Path) -> None:
    import open_clip
    import torch

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    with torch.no_grad():
        want = model.eval().encode_text(tokenize(TEXTS)).numpy()
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    found = text_encoder(f"open_clip:local-dir:{clip_folder}")
    np.testing.assert_allclose(found.encode(TEXTS), want, atol=1e-5)
    assert found.revision


def test_the_encoder_decides_who_stands_for_whom(bert: Path, tmp_path: Path) -> None:
    """The kept prompts are those nearest to the centres of the best clustering in the encoder's space."""
    texts = [" ".join([main] * 6 + [other]) for main in ("snow", "bridge", "birds") for other in ("red", "old", "wire")]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    settings = {"source": str(tmp_path / "p.txt"), "keep": 3, "encoder": f"sentence:{bert}", "near": None}
    run = Run(create(tmp_path / "store"), recipes.override(recipes.load("embedded"), sets({"prompts": settings})))
    prompts(run)
    kept = {row["text"] for row in rows(run.store, "SELECT text FROM prompts WHERE kept")}
    x = text_encoder(f"sentence:{bert}").encode(texts).astype(float)
    best, heads = np.inf, set()
    for way in itertools.product(range(3), repeat=9):
        groups = [[i for i in range(9) if way[i] == c] for c in range(3)]
        cost = sum(((x[group] - x[group].mean(0)) ** 2).sum() if group else np.inf for group in groups)
        if cost < best:
            best = cost
            heads = {texts[min(group, key=lambda i, g=group: ((x[i] - x[g].mean(0)) ** 2).sum())] for group in groups}
    assert kept == heads
    # Another space is another set of prompts, and so refused beside the first.
    other = recipes.override(run.recipe, [(["prompts", "encoder"], None)])
    with pytest.raises(WinnowError, match="made with other settings, models or inputs"):
        prompts(Run(run.store, other))


def test_a_folder_that_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"text encoder .*: the folder has no config.json"):
        text_encoder(f"sentence:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WinnowError, match=r"text encoder .*: cannot be loaded"):
        text_encoder(f"sentence:{tmp_path}").encode(["x"])
