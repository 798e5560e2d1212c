"""What goes into every exported folder beside the weights: the tokenizer's files, generation settings, licences.

Reads the folder that the model is from; writes into the new one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from puzzle.checkpoint import TOKENIZER_FILES, VOCABULARY_FILES
from puzzle.types import ConfigError

GENERATION_CONFIG = "generation_config.json"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def begin(out_dir: Path, tokenizer_dir: Path) -> None:
    """Makes ``out_dir``. ConfigError where it is in use, or ``tokenizer_dir`` holds no tokenizer."""
    if not any((tokenizer_dir / name).is_file() for name in VOCABULARY_FILES):
        looked_for = ", ".join(VOCABULARY_FILES)
        raise ConfigError(
            f"{tokenizer_dir}: no tokenizer here; looked for {looked_for}; `puzzle convert` takes --tokenizer FOLDER"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty; give a new folder")


def copy_tokenizer(tokenizer_dir: Path, out_dir: Path) -> None:
    """The tokenizer with its chat template, and the settings of ``generate``."""
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, out_dir / name)


def copy_licences(source_dir: Path, out_dir: Path) -> None:
    for pattern in LICENCES:
        for file in source_dir.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out_dir / file.name)
