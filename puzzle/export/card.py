"""The model card: what a model is, under which licence, what was changed layer by layer, what it is worth.

Reads the run's evaluation and solution, or of a converted model its architecture only; computes text. Pure. All that
comes from elsewhere (names, licences, configs) is escaped or fenced, so that it cannot become part of the card's own
words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import yamlfiles
from puzzle.capabilities import FORMAT_OF, findings, told
from puzzle.pruning import change
from puzzle.report.layers import Layer, block_of
from puzzle.types import Architecture, Format, ModelShape, PuzzleError, Site, Strict, part_of

if TYPE_CHECKING:
    from puzzle.run import Run

BEGIN, END = "<!-- verification: written by `puzzle verify` -->", "<!-- end of verification -->"
BAR = 10  # characters of a full one
LIBRARY: Mapping[Format, str] = {"hf": "transformers", "nemotron-nas": "vllm", "gguf": "gguf", "mlx": "mlx"}
SEARCHED = """\
Puzzle's way (arXiv 2411.19146): variants of every block trained alone, each scored in the base model, the best
combination within the limits found exactly, then distilled as a whole."""
PRUNED = """\
Minitron's way (arXiv 2407.14679, 2408.11796): what does least goes, alike in all layers, and the rest is distilled as a
whole."""
_LIMITS = "with this constraint file:"
LICENCE_KEYS = ("license", "license_name", "license_link")
_PURPOSE = {"gguf": "llama.cpp", "mlx": "mlx-lm", "nemotron-nas": "vLLM and other readers of nemotron-nas"}
_LOADING: Mapping[Format, str] = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{trust})
```

Where layers differ from one another, the checkpoint carries its own modelling code; with `puzzle-nas` installed,
`import puzzle.modeling` makes that flag unnecessary. Where all layers came out alike, it is a plain checkpoint of its
family and does not need it. vLLM serves it where `puzzle-nas` is installed beside it: `vllm serve THIS_FOLDER`.""",
    "nemotron-nas": "```sh\nvllm serve THIS_FOLDER --trust-remote-code      # the code is a config class\n```",
    "gguf": "```sh\nllama-server -m model.gguf\n```",
    "mlx": "```sh\nmlx_lm.generate --model THIS_FOLDER --prompt …\n```",
}


@dataclass(frozen=True)
class Licence:
    """``fields``: of the base model's card. A Llama licence wants its name in the model's, and a notice."""

    fields: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> Licence:
        """Of the model in ``folder``; nothing where its card does not say, or cannot be read."""
        readme = folder / "README.md"
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        match = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
        try:
            header = yamlfiles.plain(yamlfiles.parse_mapping(match[1], readme)) if match else {}
        except PuzzleError:
            header = {}
        return cls({name: header[name] for name in LICENCE_KEYS if isinstance(header.get(name), str)})

    @property
    def llama(self) -> str | None:
        """``Llama 3.1`` where the licence is that; None where it is another."""
        said = " ".join(self.fields.values()).lower()
        match = re.search(r"llama[-_ ]?(\d(?:\.\d)?)", said)
        return f"Llama {match[1]}" if match else None

    def words(self) -> str:
        if not self.fields:
            return "The licence of the base model, which its card here does not name, applies to this model."
        named = ", ".join(_text(value) for value in self.fields.values())
        text = f"The licence of the base model applies to this model: {named}."
        if self.llama:
            text += (
                f" Built with Llama. {self.llama} is licensed under the {self.llama} Community License, Copyright © "
                "Meta Platforms, Inc. All Rights Reserved."
            )
        return text


def run_card(run: Run, target: Format) -> str:
    """The card of a run's student."""
    from puzzle.report.summary import Summary

    summary, recipe = Summary.of(run), run.recipe
    rows = {
        "base model": _text(recipe["teacher"]),
        **_changed(run),
        "text": f"{_text(recipe['text'])}, in four disjoint sets: to train on, to score on, to choose by, to report on",
        "global distillation": f"{recipe['kd_tokens']:,} tokens" + _distilled_by(recipe),
        "evaluation": f"{run.config.evaluate.sequences} sequences on which nothing was chosen",
        "seed": recipe["seed"],
    }
    limits = _fenced(run.constraints.read_text(encoding="utf-8"), "yaml") if run.constraints else ""
    made = "\n".join(
        [
            "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), "",
            f"{PRUNED if run.config.prune else SEARCHED} `puzzle run config.yaml` does all of it:", "",
            _fenced(yamlfiles.dump(run.config), "yaml"),
            *(["", _LIMITS, "", limits] if limits else []),
        ]
    )  # fmt: skip
    figures = summary.table() + "\n\nA 95 % interval is ± 1.96 standard errors.\n"
    drawn = _drawing(summary.layers)
    return _card(
        run.teacher_name, Licence.of(run.teacher), target, "finetune", figures + "\n## Layers\n\n" + drawn, made
    )


def _distilled_by(recipe: Mapping[str, Any]) -> str:
    """Words for another teacher than the base model."""
    return f", from {_text(recipe['distilled_by'])}" if "distilled_by" in recipe else ""


def _changed(run: Run) -> dict[str, str]:
    """Rows of the card."""
    if run.config.prune is not None:
        return {"pruned": change(run.shape, run.student_shape)}
    return {
        "limits": _text(run.recipe["constraints"]),
        "block-wise distillation": f"{run.recipe['bld_tokens']:,} tokens for each of the variants on offer",
    }


def converted_card(name: str, licence: Licence, target: Format, shape: ModelShape, layers: Architecture) -> str:
    """The card of a model that was read in one format and written in another."""
    found = [
        Layer(*(block_of(shape, Site(layer, part_of(spec)), spec) for spec in specs))
        for layer, specs in enumerate(layers)
    ]
    made = f"`puzzle convert` wrote this model in another format; its weights are those of {_text(name)}.\n"
    return _card(name, licence, target, "quantized", "## Layers\n\n" + _drawing(found), made)


def _card(base: str, licence: Licence, target: Format, relation: str, content: str, made: str) -> str:
    prefix = "Llama-" if licence.llama and not base.lower().startswith("llama") else ""
    header = {
        "base_model": base,
        "base_model_relation": relation,
        **licence.fields,
        "library_name": LIBRARY[target],
        "pipeline_tag": "text-generation",
        "tags": ["puzzle", "pruning", "distillation"] if relation == "finetune" else ["puzzle"],
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items()]
    purpose = f", for {_PURPOSE[target]}" if target in _PURPOSE else ""
    return "\n".join(
        [
            "---", *lines, "---", "",
            f"# {prefix}{_text(base.rpartition('/')[2])}-puzzle{purpose}", "",
            licence.words(), "",
            content, "",
            "## Runtimes", "", BEGIN, END, "",
            "## Loading", "", _LOADING[target], "",
            "## How it was made", "", made,
        ]
    )  # fmt: skip


def with_verdicts(card: str, verdicts: Sequence[str], others: Sequence[str] = ()) -> str:
    """The card with what runtimes made of the model in the place where that stands; at its end if there is none."""
    lines = [f"- {_text(line)}" for line in (*verdicts, *others)]
    section = "\n".join([BEGIN, *lines, END])
    if BEGIN not in card or END not in card:
        return f"{card}\n## Runtimes\n\n{section}\n"
    before, _, rest = card.partition(BEGIN)
    return before + section + rest.partition(END)[2]


@dataclass(frozen=True)
class Untried(Strict):
    """A runtime that was not run, and what is known of it; ``refuses``: it is known that it cannot load the model."""

    runtime: str
    line: str
    refuses: bool


def untried(target: Format, shape: ModelShape, layers: Architecture, tried: Sequence[str]) -> tuple[Untried, ...]:
    """The other runtimes that read the format, and those that refuse the model."""
    found = []
    for runtime, read in FORMAT_OF.items():
        if read != target:
            continue
        refused = told(one for one in findings(runtime, layers, shape) if one.capability.status == "refused")
        if refused:
            found.append(Untried(runtime, f"{runtime}: cannot load it: {'; '.join(refused)}", refuses=True))
        elif runtime not in tried:
            line = f"{runtime}: not verified (loads every block of it, by what is known)"
            found.append(Untried(runtime, line, refuses=False))
    return tuple(found)


def with_loading(card: str, own_code: bool) -> str:
    """The card of a checkpoint that carries modelling code, or does not."""
    return card.replace('"THIS_FOLDER"{trust}', '"THIS_FOLDER"' + (", trust_remote_code=True" if own_code else ""))


def _drawing(layers: Sequence[Layer]) -> str:
    """A table of the layers; bars are parameters as a share of the base model's block."""
    rows = ["| layer | attention | | FFN | |", "|---|---|---|---|---|"]
    for index, layer in enumerate(layers):
        filled = [min(BAR, round(BAR * block.share)) for block in layer.blocks]
        left, right = (f"`{'█' * count}{'·' * (BAR - count)}`" for count in filled)
        rows.append(f"| {index} | {layer.attention.name} | {left} | {layer.ffn.name} | {right} |")
    return "\n".join(rows)


def _text(value: object) -> str:
    """One line in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(str(value).split()))


def _fenced(text: str, language: str) -> str:
    """A code block with a fence that does not occur in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
