"""Perplexities and vectors for nothing: caught while answers are sampled, from passes that are made anyway (paper §5).

They are of the tokens that the model saw: the output given its prompt, and the prompt with the output. `score_rows`
with prompts gives the same, and measures what was not caught.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from isheep.artifacts import Journal
from isheep.sampler.request import Completion, SamplingParams
from isheep.score import VectorFile, perplexity
from isheep.stages import Row
from isheep.text.tokenizer import Tokenizer

MEASURES = ("output_ppl", "pair_ppl", "num_output_tokens", "num_pair_tokens")


class Catch:
    """Catches what is journaled in `journal`, a row a key. Vectors of `width` numbers go to `path`."""

    def __init__(self, path: Path, width: int, journal: Journal, tokenizer: Tokenizer) -> None:
        self._journal, self._tokenizer = journal, tokenizer
        self._vectors = VectorFile(path, width, len(self._arrived()))

    def asks(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """`params`, asking for log-probabilities and vectors too."""
        return replace(params, logprobs=0, num_prompt_logprobs=num_prompt_tokens - 1, pool=True)

    def of(self, completion: Completion) -> Row | None:
        """The measures of an answer, whose vectors are kept; call it right before the answer is journaled.

        None where they are not those of its text, which was cut within its tokens, or where there are no vectors.
        """
        ids = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
        if completion.vectors is None or self._tokenizer.decode(ids) != completion.text:
            return None
        output = [entry["logprob"] for entry in (completion.logprobs or [])[: len(ids)]]
        pair = [entry["logprob"] for entry in completion.prompt_logprobs or []] + output
        self._vectors.append(completion.vectors[None])
        return {
            "output_ppl": _perplexity(output),
            "pair_ppl": _perplexity(pair),
            "num_output_tokens": len(output),
            "num_pair_tokens": completion.num_prompt_tokens + len(output),
        }

    def save(self, order: Iterable[str]) -> None:
        """All answers are journaled, and will be sealed in this order of their keys: the vectors too."""
        place = {key: i for i, key in enumerate(self._arrived())}
        self._vectors.save([place[key] for key in order if key in place])

    def _arrived(self) -> list[str]:
        """The keys of what was caught, as it came."""
        return [key for key, (row,) in self._journal.done.items() if row["caught"] is not None]


def _perplexity(logprobs: list[float]) -> float | None:
    return perplexity(-sum(logprobs) / len(logprobs)) if logprobs else None
