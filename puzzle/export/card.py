"""The model card of a student: what it is, what was changed layer by layer, what it is worth, how to load it.

Reads the run's evaluation and solution; computes text. Pure.
"""

from __future__ import annotations

from puzzle.pruning import change
from puzzle.report.summary import Summary
from puzzle.run import Run

_TEXT = """---
base_model: {teacher}
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-generation
tags: [puzzle, pruning, distillation]
---

{table}
## Loading

{loading}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

## How it was made

{how}; seed {seed}. The licence of the teacher applies to this model.
"""
_SEARCHED = """\
`puzzle run` (block-wise distillation, exact replace-one scores, MIP, global distillation; arXiv 2411.19146) on the
teacher `{teacher}`, text `{text}`, constraint file `{constraints}`; BLD {bld_tokens:,} tokens per variant, GKD
{kd_tokens:,} tokens"""
_PRUNED = """\
`puzzle run` (uniform pruning, global distillation; arXiv 2407.14679, 2408.11796) of the teacher `{teacher}`: {change}.
Text `{text}`; GKD {kd_tokens:,} tokens"""
_UNLIKE = """\
Layers differ from one another, so the checkpoint carries its own modelling code (plain family checkpoints, where all
layers came out alike, do not need `trust_remote_code`; with `puzzle-nas` installed, `import puzzle.modeling` makes it
unnecessary, too)"""
_ALIKE = "A plain checkpoint of the teacher's family, which needs no code of its own"


def model_card(run: Run) -> str:
    """The text of README.md."""
    if run.config.prune is None:
        loading, trust, how = _UNLIKE, ", trust_remote_code=True", _SEARCHED.format(**run.recipe)
    else:
        loading, trust, how = _ALIKE, "", _PRUNED.format(change=change(run.shape, run.student_shape), **run.recipe)
    return _TEXT.format(table=Summary.of(run).markdown(), loading=loading, trust=trust, how=how, **run.recipe)
