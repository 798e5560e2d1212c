"""What each stage does: makes the units that are missing, publishing each as soon as it is whole.

The torch lane's side of the pipeline; every function takes a :class:`~puzzle.run.Run` and the planned units that are
missing, reads what earlier stages published, and writes nothing but those units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import transformers

from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stages.distill import make_distill
from puzzle.stages.generate import make_generate
from puzzle.stages.kd import make_kd
from puzzle.stages.profile import make_fit_costs, make_profile
from puzzle.stages.prune import make_importance, make_prune
from puzzle.stages.refine import make_refine
from puzzle.stages.rescore import make_rescore
from puzzle.stages.score import make_score
from puzzle.stages.starts import make_data, make_init
from puzzle.stages.student import make_build, make_evaluate, make_export
from puzzle.stages.tournament import make_tournament
from puzzle.stages.truth import make_truth

transformers.logging.set_verbosity_error()  # its warnings are about uses that are not ours
transformers.logging.disable_progress_bar()

MAKERS: Mapping[str, Callable[[Run, Sequence[Planned], Progress], None]] = {
    "data": make_data,
    "init": make_init,
    "distill": make_distill,
    "score": make_score,
    "rescore": make_rescore,
    "additivity": make_truth,
    "importance": make_importance,
    "refine": make_refine,
    "generate-data": make_generate,
    "truth": make_truth,
    "profile": make_profile,
    "fit-costs": make_fit_costs,
    "tournament": make_tournament,
    "build": make_build,
    "prune": make_prune,
    "kd": make_kd,
    "evaluate": make_evaluate,
    "export": make_export,
}
