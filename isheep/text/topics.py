"""Topic-guided instructions: the model finds topics for 20 types of question, then writes a question on each.

The method is Dromedary's (paper §9); types, examples and words are this project's own.
"""

from isheep.text.lists import numbered, parse_numbered

NUM_TOPICS = 10  # of each type
TOPICS_STOP = (f"\n{NUM_TOPICS + 1}.", "\nType:")
QUESTION_STOP = ("\n",)

TYPES = (
    "questions about how something in nature works",
    "questions about the meaning and origin of a word",
    "questions about an event in history and what followed from it",
    "questions about a place and what is found there",
    "questions about a person and what they did",
    "questions about a book, a painting or a piece of music",
    "questions that need a calculation",
    "questions that need several logical steps",
    "questions about the difference between two similar things",
    "questions that rest on a wrong assumption",
    "questions that nobody can answer without news of the day",
    "questions about health and the body",
    "questions about law, contracts and duties",
    "questions about money and trade",
    "questions about tools, machines and materials",
    "questions about computers and programs",
    "questions on which reasonable people disagree",
    "questions about what would be right or wrong to do",
    "questions that ask for advice or for a plan",
    "requests for a story, a poem or an idea",
)

_EXAMPLE_TYPE = "questions about cooking"
_EXAMPLE_TOPICS = (
    "soups for cold days",
    "why dough rises",
    "cooking without milk",
    "sharpening knives",
    "food for forty guests",
    "leftover rice",
    "spices of North Africa",
    "the heat of an oven",
    "keeping herbs fresh",
    "a first dish for children",
)
# (type, topic, question)
_EXAMPLES = (
    (TYPES[0], "migrating birds", "How do birds that fly at night find their way?"),
    (TYPES[6], "baking for guests", "A loaf serves 5 people. How many loaves do I need for 32, and how much is left?"),
    (TYPES[9], "the Moon", "Why is the far side of the Moon always dark?"),
    (TYPES[19], "an old harbour", "Write a short story about the last ferry that leaves an old harbour."),
)


def topics_prompt(kind: str) -> str:
    """Asks for `NUM_TOPICS` topics of a type of question; read the reply with `parse_topics`."""
    return (
        f"{NUM_TOPICS} different topics for each type of question, in a few words each:\n\n"
        f"Type: {_EXAMPLE_TYPE}\n{numbered(_EXAMPLE_TOPICS)}\nType: {kind}\n1."
    )


def parse_topics(text: str, is_cut: bool) -> list[str]:
    """The different ones among the first `NUM_TOPICS`."""
    items, _ = parse_numbered(text, 1, is_cut)
    return list({item.lower(): item for item in items[:NUM_TOPICS]}.values())


def topic_prompt(kind: str, topic: str) -> str:
    """Asks for one question of this type on this topic; it is one line."""
    shown = [f"{_item(*example[:2])} {example[2]}\n\n" for example in _EXAMPLES]
    return f"One question for each type and topic:\n\n{''.join(shown)}{_item(kind, topic)}"


def _item(kind: str, topic: str) -> str:
    return f"Type: {kind}\nTopic: {topic}\nQuestion:"
