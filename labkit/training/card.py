"""The model card: written from the evidence of a training and an evaluation, so that no figure in it is typed by hand.

``python -m labkit.training.card MODEL --run RUN --evaluation FILE`` puts the evidence beside the model and writes the
card; without the options it writes the card anew from the evidence that is there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from labkit.errors import UserError
from labkit.files import write_atomic
from labkit.training import card_student
from labkit.training.evaluate import table_rows
from labkit.training.evidence import EVIDENCE, Evidence, read_evidence, take_evidence
from labkit.training.figure import training_figure
from labkit.training.headlines import LABELS, combinations
from labkit.training.ledger import ACCOUNTS, BUCKET_TOKENS, FAMILIES, MOST_TRADES, SYMBOLS, make_problem

FIGURE = "curve.svg"
_ABOUT = {
    "lookup": "a field of a trade",
    "net": "lots bought less lots sold of a symbol",
    "notional": "price times quantity, worked out digit by digit",
    "fees": "the fees of an account added up",
    "largest": "the trade of a symbol with most lots",
    "count": "how many trades of a symbol or an account are buys, or sells",
    "limit": "whether the notional of a trade is above a limit",
    "headline": "the label of a headline: positive, negative or neutral",
}


def write_card(model: Path) -> Path:
    """Writes ``README.md`` and the figure of ``model`` from its evidence; returns the card's path. Raises UserError."""
    evidence = read_evidence(model)
    write_atomic(model / EVIDENCE / FIGURE, training_figure(evidence.curve))
    write_atomic(model / "README.md", card_text(model.name, evidence))
    return model / "README.md"


def card_text(name: str, evidence: Evidence) -> str:
    """The card of a model called ``name``, Markdown behind the front matter that the Hugging Face hub reads."""
    taught = "teacher" in evidence.manifest
    parts = (
        _front_matter(name, evidence),
        _introduction(name, evidence),
        _use(name),
        _task(),
        _training(evidence),
        _results(evidence),
        *((card_student.beside_teacher(evidence),) if taught else ()),
        _made_easier(),
        _limits(),
        card_student.again(name, evidence) if taught else _again(name, evidence),
    )
    return "\n\n".join([parts[0], *(_filled(part) for part in parts[1:])]) + "\n"


def _filled(text: str) -> str:
    """``text`` with its paragraphs and list items in lines of one width; code, tables and headings as they are."""
    blocks: list[str] = []
    for block in text.split("\n\n"):
        if blocks and blocks[-1].count("```") % 2:
            # a blank line inside code
            blocks[-1] += f"\n\n{block}"
            continue
        if block.startswith("- "):
            items = (" ".join(item.split()) for item in re.split(r"^- ", block, flags=re.MULTILINE)[1:])
            block = "\n".join(_fill(item, "- ", "  ") for item in items)
        elif not block.startswith(("```", "|", "#", "!")):
            block = _fill(" ".join(block.split()), "", "")
        blocks.append(block)
    return "\n\n".join(blocks)


def _fill(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text, 118, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _front_matter(name: str, evidence: Evidence) -> str:
    lines = [
        "---",
        "license: apache-2.0",
        "language: en",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- qwen2",
        "- synthetic-data",
        "- arithmetic",
        "model-index:",
        f"- name: {name}",
        "  results:",
    ]
    for bucket, share in evidence.evaluation["buckets"].items():
        lines += [
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            f"      name: ledger task, {bucket} prompts",
            f"      type: ledger-{bucket}",
            "    metrics:",
            "    - type: exact_match",
            "      name: exact match",
            f"      value: {share['share']}",
        ]
    return "\n".join([*lines, "---"])


def _introduction(name: str, evidence: Evidence) -> str:
    problem = _example("net")
    return f"""# {name}

A Qwen2 model of {evidence.manifest["parameters"] / 1e6:.1f} million parameters ({evidence.weight_bytes / 1e6:.1f} MB in
bfloat16) that answers questions about a blotter of trades. It thinks in `<think>…</think>`, then gives the answer and
nothing else. It exists so that a lab of LLM inference can ask a real question, get a real answer, and check it, on any
machine and without a download. It is good for that and for nothing else.

A prompt, here one of the shortest:

```text
{problem.prompt}
```

and what the model should write:

```text
<think>{problem.thought}</think>{problem.answer}
```"""


def _use(name: str) -> str:
    problem = _example("notional")
    prompt = json.dumps(problem.prompt)
    return f"""## How to use it

With labkit, from the root of its repository:

```bash
labkit serve data/models/{name} --port 8000
labkit load http://127.0.0.1:8000 --users 8 --requests 40
```

With `transformers` alone, from this directory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(".")
prompt = {prompt}
messages = [{{"role": "user", "content": prompt}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(output, skip_special_tokens=True))  # ends with {problem.answer}
```

Decode greedily, as `generation_config.json` says; a sampled digit is a wrong digit."""


def _task() -> str:
    lengths = ", ".join(f"{bucket} {low} to {high}" for bucket, (low, high) in BUCKET_TOKENS.items())
    rows = []
    for family in FAMILIES:
        problem = _example(family)
        rows.append(f"| {family} | {_ABOUT[family]} | {problem.prompt.splitlines()[-1]} | {problem.answer} |")
    table = "\n".join(["| family | what is asked | for example | answer |", "| --- | --- | --- | --- |", *rows])
    return f"""## The task

A generator writes blotters and asks questions of {len(FAMILIES)} families about them, each with its one right
answer and the one way to work it out. Prompts come in three lengths, in tokens with the chat template: {lengths}.

{table}"""


def _training(evidence: Evidence) -> str:
    manifest, options, machine = evidence.manifest, evidence.manifest["options"], evidence.manifest["machine"]
    shape = options["shape"]
    speeds = sorted(float(str(row["tokens_per_s"])) for row in evidence.curve if "tokens_per_s" in row)
    began = next(row for row in evidence.curve if "elapsed_s" in row)
    begun = float(str(began["elapsed_s"]))
    compiled = f"{'compiled code and ' if options['compile'] else ''}the first {began['step']} steps"
    micro = options["micro_batch"]
    batch = f"{micro} sequences" if micro else f"{options['batch_tokens']:,} tokens"
    rows = {
        "data": f"generated as it is consumed, seed {manifest['data_seed']}; no document comes twice",
        "steps": f"{manifest['steps']:,}",
        "tokens": f"{manifest['tokens'] / 1e6:,.1f} million",
        "wall time": f"{manifest['elapsed_s']:.0f} s, the first {begun:.0f} s of which brought {compiled}",
        "speed": f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median)",
        "machine": f"{machine.get('gpu', 'CPU')}, {machine['cores']} CPU cores",
        "software": f"Python {machine['python']}, torch {machine['torch']}",
        "optimizer": f"fused AdamW, betas {tuple(options['betas'])}, epsilon {options['eps']:g}, "
        f"weight decay {options['weight_decay']:g} (matrices only), gradient norm at most {options['clip']:g}",
        "learning rate": f"{options['lr']:g}, {options['schedule']} down to {options['final_lr']:.0%} of it, "
        f"{options['warm_up']} steps of warm-up",
        "batch": f"{batch} × {options['accumulate']}",
        "precision": f"{'bfloat16 autocast over ' if options['autocast'] else ''}float32 weights, written as bfloat16",
        "network": f"{shape['layers']} layers, width {shape['hidden']}, {shape['heads']} heads with "
        f"{shape['kv_heads']} of keys and values, feed-forward {shape['intermediate']}, "
        f"vocabulary {shape['vocabulary']}, context {shape['context']:,}, embeddings tied",
    }
    taught = "teacher" in manifest
    if taught:
        rows["loss"] = card_student.lesson(manifest)
    origin = card_student.origin(manifest) if taught else "From nothing"
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])
    first, last = (", ".join(f"{share:.0%}" for share in options[key]) for key in ("first_shares", "shares"))
    return f"""## How it was trained

{origin}, on documents of one blotter and as many questions as fit. Thoughts and answers are learnt, prompts are
not; a token of an answer counts three times. Short, medium and long documents are drawn {first} of the time at
first and {last} from a quarter of the training on.

{table}

![Loss and probes over the steps]({EVIDENCE}/{FIGURE})

[{EVIDENCE}/]({EVIDENCE}) holds the manifest of the run, every line of the curve and the account of the evaluation,
from which this card is generated."""


def _results(evidence: Evidence) -> str:
    account = evidence.evaluation
    header, *rows = table_rows(account)
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    machine = account["machine"]
    text = f"""## Exact match on unseen problems

{account["problems"]:,} problems of each length, seed {account["seed"]}, which training never draws from; greedy
decoding (`labkit evaluate`) in {account["dtype"]} on {machine.get("gpu", "a CPU")}. An answer is right if what follows
`</think>` is exactly the answer. In brackets the Wilson 95 % interval.

{chr(10).join(lines)}"""
    weak = [
        f"{family} in {bucket} prompts, {share['share']:.1%}".replace("%", " %")
        for bucket, families in account["families"].items()
        for family, share in sorted(families.items())
        if share["share"] < 0.95
    ]
    if weak:
        text += "\n\nBelow 95 %: " + "; ".join(weak) + "."
    if wrong := account["wrong"]:
        text += "\n\n" + _mistakes(wrong)
    return text


def _mistakes(wrong: list[dict[str, Any]]) -> str:
    """Where the thoughts of wrong answers leave the right one."""
    places = {"first": 0, "last": 0, "between": 0}
    for mistake in wrong:
        written, right = (mistake[key].partition("</think>")[0].splitlines() for key in ("wrote", "right"))
        pairs = zip(written, right, strict=False)
        place = next((number for number, (one, other) in enumerate(pairs) if one != other), len(right) - 1)
        places["first" if place == 0 else "last" if place == len(right) - 1 else "between"] += 1
    return (
        f"Of {len(wrong)} wrong answers on record, {places['first']} go astray in the first line of the thought, where "
        f"a row of the blotter is looked up, {places['last']} in the last line, where a result is named, and "
        f"{places['between']} between, where the figures are worked out."
    )


def _made_easier() -> str:
    held, shown = (sum(combinations(label, held_out) for label in LABELS) for held_out in (True, False))
    return f"""## What was made easier than a blotter is

A model this small does not search, count and add as a larger one might. The task was cut to fit it:

- Symbols and accounts carry running numbers in their rows (`ACME3` is the third trade of ACME), so that going
  through the trades of a symbol is looking up `ACME1`, `ACME2` and so on.
- A control line after the rows says how many trades every symbol and account has (`ACME=5`), so that the model need
  not find out when to stop.
- No symbol and no account has more than {MOST_TRADES} trades, and no symbol two trades of the same size.
- Quantities are lots from 1 to 99, prices whole numbers from 100 to 999, fees from 1 to 99, in a fixed number of
  digits.
- In thoughts, sums and partial products are written units first, the way one adds on paper (`740` is 47).
- Limits are multiples of 500, and compared as numbers of five digits.
- There are {len(SYMBOLS)} symbols and {len(ACCOUNTS)} accounts, each one token, and three wordings of every
  question, all seen in training.
- Headlines join a phrase, which decides the label, with a setting, which does not. {held} of {held + shown}
  combinations are kept for evaluation; every phrase and every setting by itself is seen in training, in other
  combinations. The family tests recall of {len(LABELS)} times a dozen phrases, not understanding of news."""


def _limits() -> str:
    return """## Limitations

- It knows this one format and these questions. Anything else gets an answer of the same form that means nothing.
- One question a prompt; it was trained on further questions about the same blotter, but not measured on them.
- It does not say when it is unsure, and it copies from long blotters less reliably than from short ones.
- It says nothing about real trades, companies or news. Names and figures are made up."""


def _again(name: str, evidence: Evidence) -> str:
    manifest = evidence.manifest
    operations = 6 * manifest["parameters"] * manifest["tokens"]
    exponent = len(f"{operations:.0f}") - 1
    machine = manifest["machine"].get("gpu", "CPU like the one above")
    limit = manifest["options"]["max_seconds"]
    clock = f" This model was ended by the clock: `--max-seconds {limit:g}`." if limit else ""
    return f"""## Train it again

One command; so many steps took {manifest["elapsed_s"]:.0f} s on one {machine}. That is some
{operations / 10**exponent:.1f} × 10^{exponent} floating-point operations, attention aside, for which a CPU needs days.
A training that was killed goes on with `--resume`. With `--steps` the data are the same every time, the weights nearly
so.{clock}

```bash
labkit train --steps {manifest["steps"]} --out build/{name}
labkit evaluate build/{name} --result build/evaluation.json
python -m labkit.training.card build/{name} --run runs --evaluation build/evaluation.json
```

`--preset article` takes the fine-tuning recipe of the article that the lab follows (learning
rate 3e-5, betas (0.9, 0.98), epsilon 1e-6, 8 micro-batches of 16); this model was not trained with it.

## Licence

Apache-2.0, like the code. The training data are generated by `labkit/training/ledger.py`; no one else's went in."""


def _example(family: str) -> Any:
    """The shortest of a few problems that training never sees."""
    return min((make_problem(1, index, "short", family) for index in range(40)), key=lambda each: len(each.prompt))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m labkit.training.card", description="Write a model's card.")
    parser.add_argument("model", type=Path, help="directory of a ledger model")
    parser.add_argument("--run", type=Path, help="run of its training, or the run store")
    parser.add_argument("--evaluation", type=Path, help="what `labkit evaluate --result` wrote")
    given = parser.parse_args(arguments)
    try:
        if (given.run is None) != (given.evaluation is None):
            raise UserError("give both --run and --evaluation, or neither")
        if given.run is not None:
            take_evidence(given.model, given.run, given.evaluation)
        print(write_card(given.model))
    except (UserError, OSError) as error:
        print(f"labkit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
