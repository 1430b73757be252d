"""The same few tasks for every model of a run, answered greedily: what training changed, for a reader's eye."""

from collections.abc import Iterator

from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import Iteration, Row, Stream, sample
from isheep.text.templates import Template
from isheep.text.tokenizer import Tokenizer

TASKS = (
    {"instruction": "Name three things one can do on a rainy afternoon at home.", "input": ""},
    {
        "instruction": "Rewrite this message so that it sounds friendly.",
        "input": "You are late again. Send me the report today.",
    },
    {"instruction": "Explain in two sentences why the sky is dark at night.", "input": ""},
)
MAX_TOKENS = 80


def show(it: Iteration, stream: Stream, tokenizer: Tokenizer, tuned: Template) -> None:
    """Answers of the adapter trained in this iteration; in the first iteration also of the base, before them.

    reads   adapter/
    writes  samples.jsonl   {model, instruction, input, output}
    """
    models = {it.name: (tuned, it.name)} if it.adapter else {"base": (it.template, None), it.name: (tuned, it.name)}
    tasks = {f"{it.name}/show/{model}/{i}": task for model in models for i, task in enumerate(TASKS)}
    what = {"tasks": list(TASKS), "max_tokens": MAX_TOKENS, "template": tuned.name}
    with it.journal("samples.jsonl", what, {"trained": it.file("adapter") / "adapter_model.safetensors"}) as journal:
        if journal.sealed:
            return

        def requests() -> Iterator[Request]:
            for key, task in tasks.items():
                template, adapter = models[key.split("/")[2]]
                ids = tokenizer.encode(template.prompt(**task))
                yield Request(key, tuple(ids), SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), adapter)

        def answered(completion: Completion) -> Row:
            return {"model": completion.id.split("/")[2], **tasks[completion.id], "output": completion.text}

        with Progress(f"{it.name} show", len(tasks)) as bar:
            sample(stream, requests(), journal, answered, bar)
        journal.seal(tasks)
