"""A chain of compression steps, 15B to 8B to 4B: each a run of its own, whose teacher is the student of the one before.

Reads a config with ``steps``, each an overlay on the rest of the config; gives one run after the other, because where a
step's teacher lies is known once the step before is done. A step that names ``prune`` prunes (a constraint file there
is asked for workloads only), one that names ``constraints`` or ``space`` searches, any other only trains: on the
language model's loss alone that is Minitron's teacher correction. Pure.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml.comments import CommentedMap

from puzzle import yamlfiles
from puzzle.basis import FIRST
from puzzle.config import RunConfig
from puzzle.run import Run
from puzzle.types import ConfigError

OF_THE_CHAIN = ("run", "teacher", "steps")
OF_A_STEP = ("prune", "constraints", "space")


@dataclass(frozen=True)
class Chain:
    """``steps``: names and configs, as resolved; the teacher in them is the chain's."""

    folder: Path
    steps: tuple[tuple[str, RunConfig], ...]

    @classmethod
    def open(cls, where: Path, overrides: Sequence[str] = ()) -> Chain | None:
        """From a config file; None where it has no steps. ConfigError lists every mistake."""
        path = yamlfiles.locate_config(where)
        if not path.is_file():
            return None  # whoever opens it as a run says so
        document = yamlfiles.read_yaml(path)
        overlays = document.pop("steps", None)
        if not overlays:
            return None
        _check_places(path, document, overlays)
        folder = Path(str(document.get("run", "")))
        steps, mistakes = [], []
        for number, overlay in enumerate(overlays, 1):
            name, merged = _step(number, document, overlay)
            merged["run"] = str(folder / "steps" / name)
            try:
                config = yamlfiles.validated(RunConfig, path, merged, overrides)
                if number < len(overlays) and "hf" not in (config.export.targets or ("hf",)):
                    mistakes.append(
                        f"{path}: export.targets of step {number} lacks hf, which the next step starts from"
                    )
                if config.widths is not None:
                    mistakes.append(f"{path}: widths in a chain of steps; choose between widths in a run of its own")
                steps.append((name, config))
            except ConfigError as error:
                mistakes += str(error).splitlines()
        if mistakes:
            raise ConfigError("\n".join(dict.fromkeys(mistakes)))
        return cls(folder, tuple(steps))

    def runs(self) -> Iterator[tuple[str, Run]]:
        """Name and run of one step after the other, as far as the step before has made its checkpoint."""
        before: Run | None = None
        for name, config in self.steps:
            if before is not None and not before.checkpoint.is_dir():
                return
            update: dict[str, object] = {} if before is None else {"teacher": str(before.checkpoint)}
            if config.kd.teacher == FIRST:
                update["kd"] = config.kd.model_copy(update={"teacher": config.teacher})
            limits = None if config.constraints is None else yamlfiles.locate("constraints", config.constraints)
            before = Run(Path(config.run), config.model_copy(update=update), limits)
            yield name, before


def _step(number: int, document: CommentedMap, overlay: CommentedMap) -> tuple[str, CommentedMap]:
    merged = overlaid(document, overlay)
    if "prune" not in overlay and ("constraints" in overlay or "space" in overlay):
        return f"{number}-search", merged
    merged["prune"] = merged.get("prune") or CommentedMap()
    return f"{number}-{'prune' if merged['prune'] else 'train'}", merged


def _check_places(path: Path, document: CommentedMap, overlays: object) -> None:
    """ConfigError for a key that stands where it cannot."""
    if not isinstance(overlays, list) or not all(isinstance(overlay, CommentedMap) for overlay in overlays):
        raise ConfigError(
            f"{path}: steps is a list, and a step what it changes of the config: - prune: {{num_layers: 16}}"
        )
    for key in OF_A_STEP:
        if key in document:
            raise ConfigError(f"{path}: {key} beside steps; name it in the step that it is for")
    for number, overlay in enumerate(overlays, 1):
        for key in OF_THE_CHAIN:
            if key in overlay:
                raise ConfigError(f"{path}: {key} in step {number}; it is of the whole chain, leave it out")


def overlaid(base: CommentedMap, overlay: CommentedMap) -> CommentedMap:
    """``base`` with what ``overlay`` says in the place of its own, section by section; every key keeps its line."""
    merged = copy.deepcopy(base)
    for key, value in overlay.items():
        own = merged.get(key)
        both = isinstance(own, CommentedMap) and isinstance(value, CommentedMap)
        merged[key] = overlaid(own, value) if both else copy.deepcopy(value)
        merged.lc.add_kv_line_col(key, overlay.lc.data[key])
    return merged
