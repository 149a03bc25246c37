"""Needle retrieval: facts hidden in real prose, asked for one by one from the cache of the whole text.

A haystack of a given length holds four facts at different depths, in RULER's wording. It goes through the
cache once; each question goes on from a copy of that cache by greedy generation and is right if the fact's
number comes out. Dense and quantised caches answer the same questions, so that their scores are paired.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msa_hf.evaluation.cache_systems import CacheSystem, using_attention
from msa_hf.evaluation.cache_texts import Text
from msa_hf.evaluation.metrics import Estimate, bootstrap, paired_difference

LENGTHS = (1024, 2048, 4096, 7500)
DEPTHS = ((0, 30, 60, 90), (10, 40, 70, 100), (20, 50, 80, 95))
_CITIES = (
    "Lisbon Nairobi Oslo Quito Dublin Hanoi Prague Cairo Athens Bogota Kyoto Lagos Madrid Geneva Havana "
    "Jakarta Vienna Zagreb Boston Manila"
).split()


@dataclass(frozen=True)
class Haystack:
    """Token ids of a text with its facts, and per fact its depth in percent, question and number.

    `length` is what was asked for: the ids, a question and an answer fit in.
    """

    length: int
    ids: list[int]
    depths: list[int]
    questions: list[list[int]]
    numbers: list[str]


@dataclass(frozen=True)
class NeedleScore:
    """Fraction of facts found, in all, by length, by depth, and against the dense cache."""

    name: str
    score: Estimate
    by_length: dict[int, float]
    by_depth: dict[int, float]
    difference: Estimate | None
    found: list[float]


def haystacks(
    tokenizer: Any,
    texts: Sequence[Text],
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[Sequence[int]] = DEPTHS,
    seed: int = 0,
) -> list[Haystack]:
    """One haystack per length and text, its facts drawn from `seed`.

    `depths` belong to the first, second, ... text, in turns. Texts that are too short are left out.
    """
    draw = random.Random(seed)
    made = []
    for length in lengths:
        for number, text in enumerate(texts):
            places = list(depths[number % len(depths)])
            facts = _facts(draw, len(places))
            sentences = [tokenizer(f" {part}")["input_ids"] for part in _sentences(text.text)]
            needles = [tokenizer(f" {sentence}")["input_ids"] for sentence, _, _ in facts]
            room = length - sum(map(len, needles)) - 32
            if sum(map(len, sentences)) >= room:
                ids = _hide(sentences, needles, places, room)
                questions = [tokenizer(question)["input_ids"] for _, question, _ in facts]
                answers = [answer for *_, answer in facts]
                made.append(Haystack(length, ids, places, questions, answers))
    return made


def measure_needle(
    model: Any, tokenizer: Any, system: CacheSystem, stacks: Sequence[Haystack], new_tokens: int = 6
) -> list[float]:
    """1.0 for every fact that the answer begins with, in the order of haystacks and their facts."""
    found = []
    with using_attention(model, system.attention), torch.inference_mode():
        for stack in stacks:
            cache = system.make(model.config)
            tokens = torch.tensor([stack.ids], device=model.device)
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for question, number in zip(stack.questions, stack.numbers):
                ids = torch.tensor([stack.ids + question], device=model.device)
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=copy.deepcopy(cache),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                )
                answer = tokenizer.decode(out[0, ids.shape[1] :])
                found.append(float(number in answer))
    return found


def summarize_needle(
    name: str,
    found: Sequence[float],
    stacks: Sequence[Haystack],
    dense: Sequence[float] | None = None,
) -> NeedleScore:
    """Scores of one system; `dense` is what DynamicCache found in the same haystacks."""
    rows = [(stack.length, depth) for stack in stacks for depth in stack.depths]
    return NeedleScore(
        name=name,
        score=bootstrap(found),
        by_length=_means(found, [length for length, _ in rows]),
        by_depth=_means(found, [depth for _, depth in rows]),
        difference=None if dense is None else paired_difference(found, dense),
        found=list(found),
    )


def _facts(draw: random.Random, count: int) -> list[tuple[str, str, str]]:
    """(sentence, question, number) of different cities."""
    facts = []
    for city in draw.sample(_CITIES, count):
        number = str(draw.randrange(1000, 10000))
        sentence = f"The special magic number for {city} is: {number}."
        question = f"\n\nThe special magic number for {city} mentioned in the text is:"
        facts.append((sentence, question, number))
    return facts


def _hide(
    sentences: Sequence[list[int]], needles: Sequence[list[int]], depths: Sequence[int], room: int
) -> list[int]:
    """Sentences up to `room` tokens, with needle i before the first one that starts at depths[i] percent."""
    kept, size = [], 0
    for sentence in sentences:
        if size + len(sentence) > room:
            break
        kept.append(sentence)
        size += len(sentence)
    ids: list[int] = []
    waiting = sorted(zip(depths, needles), key=lambda pair: pair[0])
    place = 0
    for sentence in kept:
        while waiting and place * 100 >= waiting[0][0] * size:
            ids += waiting.pop(0)[1]
        ids += sentence
        place += len(sentence)
    for _, needle in waiting:
        ids += needle
    return ids


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


def _means(values: Sequence[float], keys: Sequence[int]) -> dict[int, float]:
    """Mean of the values that share a key, keys in order."""
    groups: dict[int, list[float]] = {}
    for value, key in zip(values, keys, strict=True):
        groups.setdefault(key, []).append(value)
    return {key: sum(groups[key]) / len(groups[key]) for key in sorted(groups)}
