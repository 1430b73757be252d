"""Templates: their bytes, that training and sampling agree on the end of a response, and the truncation rule."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isheep.config import UserError
from isheep.text.templates import TEMPLATES, cut_lengths, template
from isheep.text.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import SPECIAL_TOKENS, write_tiny_tokenizer

ROW = {"instruction": "Add the numbers.", "input": "2 3", "output": "5"}
EXPECTED = {
    "raw": "Add the numbers.\n2 3\n",
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nAdd the numbers.\n2 3<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nAdd the numbers.\n2 3<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "alpaca": (
        "Here is a task for you. Write a response that does what it asks.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n2 3\n\n### Response:\n"
    ),
}
names = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder, eos="<|endoftext|>")
    return load_tokenizer(folder)


@names
def test_bytes_of_the_prompt(name):
    assert template(name).prompt(ROW["instruction"], ROW["input"]) == EXPECTED[name]
    alone = EXPECTED[name].replace("\n\n### Input:\n2 3" if name == "alpaca" else "\n2 3", "")
    assert template(name).prompt(ROW["instruction"]) == alone


@names
def test_one_user_message_is_the_prompt(name):
    assert template(name).chat([{"role": "user", "content": "Hello?"}]) == template(name).prompt("Hello?")


def test_conversation_of_several_turns():
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert template("chatml").chat(talk) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        template("llama3")
        .chat(talk[1:])
        .startswith(
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        )
    )


@pytest.mark.skipif(not (Path(__file__).parents[2] / "../shared/data").is_dir(), reason="needs the shared tokenizers")
def test_llama3_is_the_models_own_template_without_bos():
    from transformers import PreTrainedTokenizerFast

    folder = Path(__file__).parents[2] / "../shared/data/tokenizers/llama3"
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"}]
    assert theirs.apply_chat_template(talk, tokenize=False) == "<|begin_of_text|>" + template("llama3").chat(talk)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one"),
        ([{"role": "asistant", "content": "x"}], 'Did you mean "assistant"'),
        ([{"content": "x"}], 'role "None"'),
        ([{"role": "user", "content": " "}], "no text"),
        ([{"role": "user"}], "no text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "last message"),
    ],
)
def test_bad_conversations(messages, said):
    with pytest.raises(UserError, match=said):
        template("chatml").chat(messages)


def test_unknown_template_names_the_nearest():
    with pytest.raises(UserError, match='Did you mean "chatml"'):
        template("chat-ml")


@names
@pytest.mark.parametrize("eos", SPECIAL_TOKENS)
def test_the_trained_end_token_stops_the_sampler(name, eos, tmp_path):
    write_tiny_tokenizer(tmp_path, eos)
    tokenizer = load_tokenizer(tmp_path)
    _, response_ids = template(name).encode_row(tokenizer, ROW, cutoff=1000)
    stops = template(name).stop_token_ids(tokenizer)
    assert response_ids[-1] in stops
    assert {tokenizer.eos_token_id, *map(tokenizer.token_id, template(name).stop)} == set(stops)
    assert response_ids[-1] == tokenizer.token_id("<|eot_id|>" if name == "llama3" else eos)


def test_a_stop_text_that_is_no_special_token_gives_no_id(tokenizer):
    class Spelled(Tokenizer):
        def __init__(self):
            super().__init__(tokenizer.backend, tokenizer.eos_token_id)
            self.special_ids = frozenset({tokenizer.eos_token_id})

    assert template("chatml").stop_token_ids(Spelled()) == (tokenizer.eos_token_id,)


def test_llama3_needs_its_end_token(tmp_path):
    write_tiny_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())).replace("<|eot_id|>", "<|other|>"))
    with pytest.raises(UserError, match=r"<\|eot_id\|>"):
        template("llama3").stop_token_ids(load_tokenizer(tmp_path))


@names
def test_training_sees_the_bytes_of_generation(name, tokenizer):
    prompt_ids, response_ids = template(name).encode_row(tokenizer, ROW, cutoff=1000)
    assert prompt_ids == tokenizer.encode(template(name).prompt(ROW["instruction"], ROW["input"]))
    assert response_ids[:-1] == tokenizer.encode(ROW["output"])


def test_cut_rows_keep_their_beginnings(tokenizer):
    row = {"instruction": "x" * 50, "input": "", "output": "y" * 60}
    prompt_ids, response_ids = template("raw").encode_row(tokenizer, row, cutoff=40)
    whole = template("raw").encode_row(tokenizer, row, cutoff=1000)
    assert [len(part) for part in whole] == [51, 61]
    assert (prompt_ids, response_ids) == (whole[0][:19], whole[1][:21])  # 40 · 61 / 112 = 21.8


@pytest.mark.parametrize(
    ("prompt_len", "response_len", "kept"),
    [
        (60, 40, (60, 40)),  # fits
        (500, 40, (60, 40)),  # twice the response fits: only the prompt is cut
        (500, 50, (50, 50)),
        (40, 500, (40, 60)),  # twice the prompt fits: only the response is cut
        (300, 100, (75, 25)),  # in proportion
        (60, 51, (55, 45)),
        (0, 500, (0, 100)),
    ],
)
def test_truncation_rule_at_100_tokens(prompt_len, response_len, kept):
    assert cut_lengths(prompt_len, response_len, cutoff=100) == kept


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 1100))
def test_truncation_keeps_the_cutoff_and_both_parts(prompt_len, response_len, cutoff):
    prompt_kept, response_kept = cut_lengths(prompt_len, response_len, cutoff)
    assert prompt_kept + response_kept == min(prompt_len + response_len, cutoff)
    assert 0 <= prompt_kept <= prompt_len and 1 <= response_kept <= response_len
    assert prompt_kept >= 1 or prompt_len == 0 or cutoff == 1
    if prompt_kept < prompt_len and response_kept < response_len:
        assert 2 * response_len > cutoff and 2 * prompt_len > cutoff
