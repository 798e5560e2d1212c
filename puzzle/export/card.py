"""The model card of a student: what it is, what was changed layer by layer, what it is worth, how to load it.

Reads the run's evaluation and solution; computes text. Pure.
"""

from __future__ import annotations

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

Layers differ from one another, so the checkpoint carries its own modelling code (plain family checkpoints, where all
layers came out alike, do not need `trust_remote_code`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

With `puzzle-nas` installed, `import puzzle.modeling` makes that flag unnecessary.

## How it was made

`puzzle run` (block-wise distillation, exact replace-one scores, MIP, global distillation; arXiv 2411.19146) on the
teacher `{teacher}`, text `{text}`, constraint file `{constraints}`; BLD {bld_tokens:,} tokens per variant, GKD
{kd_tokens:,} tokens; seed {seed}. The licence of the teacher applies to this model.
"""


def model_card(run: Run) -> str:
    """The text of README.md."""
    return _TEXT.format(table=Summary.of(run).markdown(), **run.recipe)
