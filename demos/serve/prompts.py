"""The prompts of the clients, short and varied, so that nearly all of the cache is generated text, and documents."""

from .. import DemoError

CHARACTERS = 4  # of the manual, per token

PROMPTS = (
    "Describe a day in the life of a baker, hour by hour.",
    "Explain how a sailing boat can move against the wind.",
    "Write the diary of a lighthouse keeper during a stormy week.",
    "How does bread dough rise? Explain every step for a curious child.",
    "Plan a small vegetable garden for a family of four, month by month.",
    "Tell the story of a clockmaker who loses track of time.",
    "Compare trains, ships and aeroplanes for carrying goods across a continent.",
    "Give detailed advice to someone who wants to learn the violin at forty.",
    "Explain what a cache is in a computer, with examples from everyday life.",
    "Write a conversation between two old friends who meet at a railway station.",
    "Describe the journey of a drop of water from a mountain spring to the sea.",
    "List the tools of a carpenter and say what each is used for.",
    "Explain how a public library decides which books to buy.",
    "Write a fairy tale about a fox who wants to become a judge.",
    "How is paper made from wood? Go through the whole process.",
    "Describe a market in a harbour town from sunrise to sunset.",
)


def about_documents(count: int, tokens: int) -> tuple[str, ...]:
    """The prompts, each behind one of ``count`` parts of Python's manual of about so many tokens."""
    from pydoc_data.topics import topics

    text, size = "\n\n".join(topics[key] for key in sorted(topics)), CHARACTERS * tokens
    if count * size > len(text):
        most = len(text) // CHARACTERS
        raise DemoError(
            f"--documents, --document-tokens: expected at most {most:,} tokens in all, got {count * tokens:,}", 2
        )
    parts = [text[i * size : (i + 1) * size] for i in range(count)]
    return tuple(f"{parts[i % count]}\n\n{prompt}" for i, prompt in enumerate(PROMPTS))
