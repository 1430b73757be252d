"""Twenty types, ten topics of each, and a line for a question."""

from isheep.text.topics import _EXAMPLES, NUM_TOPICS, TYPES, parse_topics, topic_prompt, topics_prompt


def test_the_types_are_twenty_different_ones() -> None:
    assert len(set(TYPES)) == 20 and NUM_TOPICS == 10
    assert {kind for kind, *_ in _EXAMPLES} <= set(TYPES)


def test_layout() -> None:
    prompt = topics_prompt(TYPES[3])
    assert prompt.endswith(f"\n\nType: {TYPES[3]}\n1.")
    shown = prompt.split("Type: ")[1].partition("\n1.")[2]
    assert len(parse_topics(shown, is_cut=False)) == NUM_TOPICS and "\n10. " in shown
    prompt = topic_prompt(TYPES[3], "deserts")
    assert prompt.endswith(f"\n\nType: {TYPES[3]}\nTopic: deserts\nQuestion:")
    assert topic_prompt(TYPES[3], "rivers").startswith(prompt.removesuffix("deserts\nQuestion:")), "a shared prefix"


def test_topics_are_ten_different_ones_at_most() -> None:
    assert parse_topics(" Bees\n2. bees\n3. Rain\n4. Sn", is_cut=True) == ["bees", "Rain"]
    many = "".join(f" topic {i}\n{i + 1}." for i in range(1, 14))
    assert parse_topics(many, is_cut=False) == [f"topic {i}" for i in range(1, 11)]
    assert parse_topics("", is_cut=True) == []
