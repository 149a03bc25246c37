"""The prompt of a comparison: as `ask` writes it, filled up with further documents of a memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from msa_hf.modeling.prompts_msa import answer_prompt


def ranked_texts(
    model: Any, tokenizer: Any, question: str, memory: Any, tokens: int, found: Sequence[int] = ()
) -> Iterator[str]:
    """Texts of a memory: those `found`, then as `rank_documents` ranks them, then the others by number.

    Args:
        tokens: of how many texts are wanted; it bounds how deep is ranked.
    """
    bank = memory.bank() if hasattr(memory, "bank") else memory
    for number in found:
        if not 0 <= number < len(bank):
            raise ValueError(f"found must hold numbers of the memory's {len(bank)} documents; got {number}")
    deep = 16 + 4 * tokens * len(bank) // max(1, bank.num_tokens)
    ranked = model.rank_documents([question], bank, k=min(max(1, len(bank)), deep), tokenizer=tokenizer)[0]
    order = dict.fromkeys(chain(found, (document.id for document in ranked), range(len(bank))))
    return (text for text in (bank.documents[number] for number in order) if text.strip())


def filled_prompt(
    tokenizer: Any, style: str, question: str, texts: Iterable[str], room: int
) -> tuple[str, str]:
    """(style, prompt) as `ask` writes it, of as many of the first texts as `room` tokens hold, at least one.

    Worked examples that would take more than half of the room are left out, as `ask` leaves them out.
    """
    if len(token_ids(tokenizer, answer_prompt(style, tokenizer, "", [])[0])) > room // 2:
        style = "chat"
    used, size = [], 0
    for text in texts:
        size += len(token_ids(tokenizer, text))
        if used and size > room:
            break
        used.append(text)
    prompt = "".join(answer_prompt(style, tokenizer, question, used))
    while len(used) > 1 and len(token_ids(tokenizer, prompt)) > room:
        used.pop()
        prompt = "".join(answer_prompt(style, tokenizer, question, used))
    return style, prompt


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """As prompts are tokenized: nothing is added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
