"""Twenty prompts: short ones, long ones of about 500 tokens, and chats. Shared by every test that compares answers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class OraclePrompt:
    """One prompt. Exactly one of `text` and `messages` is set."""

    name: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) pairs, rendered with the model's chat template."""


NEW_TOKENS = 64

_STORY = (
    "The lighthouse keeper wrote in the log every evening, as the keepers before him had done for {years} years. "
    "He noted the wind, the colour of the water, and the ships that passed; on some evenings there were none. "
    "In the winter of {start} a storm took the lower stairs, and for {days} days he could not come down. "
)
_LIST = (
    "Item {n}: the part numbered {code} weighs {grams} grams, costs {price}.99 dollars and is kept on shelf {shelf}. "
)


def _long_story(seed: int) -> str:
    parts = [_STORY.format(years=40 + seed * 3 + i, start=1850 + seed * 7 + i, days=3 + i) for i in range(6)]
    return "".join(parts) + "When the supply boat came at last,"


def _long_list(seed: int) -> str:
    rows = [
        _LIST.format(n=i, code=1000 + 37 * i + seed, grams=20 + 13 * i, price=5 + i * seed, shelf="ABCDEF"[i % 6])
        for i in range(1, 15)
    ]
    return "".join(rows) + "In summary, the heaviest part is"


_SHORT = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "2 + 2 = 4\n3 + 5 = 8\n12 + 30 =",
    "Water boils at",
    "Die Hauptstadt von Österreich heißt",
    "The three primary colours are",
    "1, 1, 2, 3, 5, 8, 13,",
)
_CHATS = (
    (("user", "What is the capital of Japan?"),),
    (("user", "Write a haiku about the sea."),),
    (("system", "You answer in one sentence."), ("user", "Why is the sky blue?")),
    (("user", "Name three fruits."), ("assistant", "Apple, pear and plum."), ("user", "Name three more.")),
    (("system", "You are a pirate."), ("user", "How do I cook rice?")),
    (("user", "Explain what a hash table is to a child."),),
)

PROMPTS: tuple[OraclePrompt, ...] = (
    *(OraclePrompt(f"short-{index}", text=text) for index, text in enumerate(_SHORT)),
    *(OraclePrompt(f"story-{seed}", text=_long_story(seed)) for seed in range(3)),
    *(OraclePrompt(f"list-{seed}", text=_long_list(seed)) for seed in range(1, 4)),
    *(OraclePrompt(f"chat-{index}", messages=messages) for index, messages in enumerate(_CHATS)),
)
assert len(PROMPTS) == 20
