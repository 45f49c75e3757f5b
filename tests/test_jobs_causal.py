"""A local language model as judge: real models of random or quickly learned weights, really asked."""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import rows, sets

from jobs import recipe as recipes
from jobs.language.causal import Causal
from jobs.language.endpoint import Reply
from jobs.language.judge import question
from jobs.prompts import prompts
from jobs.run import Run
from schemas.errors import WinnowError
from storage.layout import create
from storage.verify import verify

TEXTS = ["a red fox in the deep snow", "two green birds on a wire", "an old boat under a bridge", "a cup",
         "the blue house at the end of a long road"]  # fmt: skip
CHAT = "{% for turn in messages %}<user>{{ turn.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"


def build(folder: Path, chat: bool = False) -> Any:
    """A Mistral of 1 layer that reads bytes, and sees 48 of them; and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    vocabulary = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<model>"]})
        tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, sliding_window=48, max_position_embeddings=2048,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
        )
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build(folder := tmp_path_factory.mktemp("models") / "babbler")
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned by heart to answer each question with good grades, and to stop then."""
    import torch
    from torch.nn.functional import cross_entropy

    folder = tmp_path_factory.mktemp("models") / "judge"
    model, tokenizer = build(folder, chat=True)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    answer = [*tokenizer('{"clarity": 8, "specificity": 6}')["input_ids"], tokenizer.eos_token_id]
    batch = []
    for text in TEXTS[:3]:
        turns = [{"role": "user", "content": question(text)}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        batch.append(tokenizer(asked, add_special_tokens=False)["input_ids"][-60:] + answer)
    tokens = torch.tensor(batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(300):
        logits = model(tokens).logits[:, -len(answer) - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), torch.tensor(answer * len(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 1e-3:
            break
    assert math.isfinite(loss.item()) and loss.item() < 0.05
    model.save_pretrained(folder)
    return folder


def a_run(tmp_path: Path, folder: Path, **judge: Any) -> Run:
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    table = {"kind": "local", "model": str(folder), "longest": 40, "batch": 2} | judge
    settings = {"source": str(tmp_path / "p.txt"), "least_clarity": 0.5, "judge": table}
    return Run(create(tmp_path / "store"), recipes.override(recipes.load("embedded"), sets({"prompts": settings})))


def test_babble_is_recorded_and_no_crash(babbler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, babbler)
    with pytest.raises(WinnowError, match="0 of 5 prompts pass, 2 are needed; reasons were such as not judged:"):
        prompts(run)
    kept = rows(run.store, "SELECT * FROM answers")
    assert {row["text"] for row in kept} == set(TEXTS)
    assert all(row["problem"] and row["clarity"] is None and row["model"] == str(babbler) for row in kept)
    assert verify(run.store).ok
    # And not asked again.
    monkeypatch.setattr(Causal, "_answers", lambda *_: pytest.fail("asked again"))
    with pytest.raises(WinnowError, match="0 of 5 prompts pass"):
        prompts(run)


def test_good_answers_are_generated_read_and_kept(judge: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path, judge)
    prompts(run)
    kept = rows(run.store, "SELECT * FROM answers WHERE problem IS NULL")
    assert {row["text"] for row in kept} >= set(TEXTS[:3])
    assert {(row["reply"], row["clarity"], row["specificity"]) for row in kept} == {
        ('{"clarity": 8, "specificity": 6}', 8, 6)
    }
    good = rows(run.store, "SELECT text FROM prompts WHERE kept")
    assert {row["text"] for row in good} == {row["text"] for row in kept}


@pytest.mark.parametrize("chat", [False, True])
def test_batches_answer_like_one_token_after_the_other(tmp_path: Path, chat: bool) -> None:
    """Against the likeliest token by a plain loop, without padding: questions of any length in batches of any size."""
    import torch

    model, tokenizer = build(tmp_path / "m", chat)
    asked = [*TEXTS, "x", ""] if chat else [*TEXTS, "x"]
    want = []
    for text in asked:
        start = tokenizer(f"<user>{text}<model>" if chat else text, add_special_tokens=False)["input_ids"]
        tokens = list(start)
        while len(tokens) < len(start) + 12 and tokens[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                tokens.append(int(model.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
        want.append(tokenizer.decode(tokens[len(start) :], skip_special_tokens=True))
    assert len(set(want)) > 3
    for batch in (1, 3, 8):
        made = dict(Causal(str(tmp_path / "m"), longest=12, batch=batch)(asked))
        assert sorted(made) == list(range(len(asked)))
        for i, text in enumerate(want):
            assert made[i].text == text if text.strip() else made[i].problem == "the model says nothing"


CANNED = {
    '{"clarity": 9, "specificity": 4}': (9, 4, None),
    'Clear! ```{"clarity": 7, "specificity": 7}```': (7, 7, None),
    '{"clarity": 9, "spec': (None, None, "no JSON object"),
    '{"clarity": 12, "specificity": 4}': (None, None, "clarity is 12, not in 1..10"),
    '{"specificity": 4}': (None, None, "the answer has no clarity"),
}


def test_what_is_said_is_read_like_an_endpoints(babbler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Causal._answers

    def answers(self: Causal, tokens: list[list[int]]) -> list[Reply]:
        made = real(self, tokens)
        assert len(made) == len(tokens)
        asked = [self.loaded[1].decode(one) for one in tokens]
        places = [next(i for i, text in enumerate(TEXTS) if f'"{text}"' in one) for one in asked]
        return [Reply(list(CANNED)[i]) for i in places]

    monkeypatch.setattr(Causal, "_answers", answers)
    run = a_run(tmp_path, babbler)
    prompts(run)
    kept = {row["text"]: row for row in rows(run.store, "SELECT * FROM answers")}
    for text, (reply, (clarity, specificity, problem)) in zip(TEXTS, CANNED.items(), strict=True):
        row = kept[text]
        assert (row["reply"], row["clarity"], row["specificity"]) == (reply, clarity, specificity)
        assert problem in row["problem"] if problem else row["problem"] is None


def test_a_question_too_long_for_the_model_is_a_reject(babbler: Path) -> None:
    made = dict(Causal(str(babbler), longest=12)(["short", "x" * 3000]))
    assert made[0].text or made[0].problem
    assert made[1] == Reply(None, "no answer: 3000 tokens and 12 of an answer are over the model's 2048")


def test_other_weights_are_another_judge(babbler: Path, judge: Path) -> None:
    one, other, longer = Causal(str(babbler)), Causal(str(judge)), Causal(str(babbler), longest=7)
    assert len({one.revision, other.revision, longer.revision}) == 3
    assert one.revision == Causal(str(babbler), batch=99).revision


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"the folder has no config.json; give a folder"):
        Causal(str(tmp_path))
    with pytest.raises(WinnowError, match="no such folder; give a model's folder or a Hub id"):
        Causal(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WinnowError, match=r"prompts.judge.model .* cannot be loaded"):
        list(Causal(str(tmp_path))(["x"]))
