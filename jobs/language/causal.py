"""A causal language model of transformers, from a folder or the Hub, that answers questions in batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from jobs.language.endpoint import Reply
from jobs.pretrained import Pretrained
from schemas.ids import digest


class Causal:
    """``model``: a folder or Hub id. Always the likeliest token, at most ``longest`` of them; ``batch`` questions of
    about the same length together. The weights are loaded when it is first asked."""

    def __init__(self, model: str, *, longest: int = 400, batch: int = 8) -> None:
        self.name, self.longest, self.batch = model, longest, batch
        self.pretrained = Pretrained(f"prompts.judge.model {model!r}", model)
        self.revision = digest(["causal", self.pretrained.revision, longest])

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from jobs import devices

        tokenizer = self.pretrained.part(AutoTokenizer)
        tokenizer.padding_side = "left"
        model = self.pretrained.model(AutoModelForCausalLM).to(devices.dtype())
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """(place of the question, Reply), batch by batch."""
        model = self.loaded[0]
        room = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        tokens = [self._tokens(question) for question in questions]
        fits = []
        for i, one in enumerate(tokens):
            if len(one) + self.longest > room:
                problem = f"no answer: {len(one)} tokens and {self.longest} of an answer are over the model's {room}"
                yield i, Reply(None, problem)
            else:
                fits.append(i)
        fits.sort(key=lambda i: len(tokens[i]))
        for start in range(0, len(fits), self.batch):
            some = fits[start : start + self.batch]
            yield from zip(some, self._answers([tokens[i] for i in some]), strict=True)

    def _tokens(self, question: str) -> list[int]:
        """The question as the model's chat format has it; a model without one gets the text as it is."""
        tokenizer = self.loaded[1]
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer(question)["input_ids"])

    def _answers(self, tokens: list[list[int]]) -> list[Reply]:
        import torch

        model, tokenizer = self.loaded
        padded = tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            made = model.generate(
                input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], max_new_tokens=self.longest,
                do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )[:, padded["input_ids"].shape[1] :]  # fmt: skip
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        replies = []
        for row in made.tolist():
            text = tokenizer.decode(row, skip_special_tokens=True)
            if not text.strip():
                replies.append(Reply(None, "the model says nothing"))
            else:
                cut = not ends & set(row)
                replies.append(Reply(text, "half an answer: cut at the longest length" if cut else None))
        return replies
