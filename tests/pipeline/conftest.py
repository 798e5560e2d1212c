"""A whole project in miniature: a random two-layer teacher, a text, a space, a grid, a constraint file and a config."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = """\
run: {folder}/run
teacher: {folder}/teacher
space: {folder}/space.yaml
constraints: {folder}/limit.yaml
device: cpu
dtype: fp32
data: {{text: {folder}/text.jsonl, sequence_tokens: 16}}
init: {{sequences: 8}}
distill: {{tokens: 64, batch_size: 2}}
score: {{sequences: 4}}
profile: {{grid: {folder}/grid.yaml}}
kd: {{tokens: 192, batch_size: 2, warmup_steps: 1, checkpoint_steps: 2}}
evaluate: {{sequences: 4}}
"""
FILES = {
    "space.yaml": "attention: [keep, gqa-2, linear, skip]\nffn: [keep, narrow-50%, linear, skip]\nffn_multiple_of: 8\n",
    "grid.yaml": "batch_sizes: [1]\nprefill_tokens: [8]\ndecode_context_tokens: [8, 16]\nrepeats: 5\n",
    "limit.yaml": (
        "workloads:\n  chat: {isl: 8, osl: 8, weights: fp32, kv: fp32, device: cpu}\nconstraints:\n  memory_gib: 80%\n"
    ),
}

WIDTHS_LIMITS = """\
workloads:
  chat: {isl: 8, osl: 8, batch_size: [1, 2], weights: fp32, kv: fp32, device: cpu}
constraints:
  params: 80%
  chat.memory_gib: 90%
  chat.output_tok_per_s: 1%
"""


@dataclass(frozen=True)
class Project:
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def copy_to(self, folder: Path) -> Project:
        """The same project elsewhere; its run, if there is one, is left behind."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("run"))
        (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
        return Project(folder)


@pytest.fixture(scope="session")
def pristine_project(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Project:
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        vocab_size=128,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    shutil.copytree(tiny_tokenizer_dir, folder / "teacher", dirs_exist_ok=True)
    rng = random.Random(0)
    with open(folder / "text.jsonl", "w") as lines:
        for split, count in (("train", 12), ("score", 4), ("select", 4), ("report", 4)):
            for index in range(count):
                text = "".join(rng.choice("abcdefgh ,.\n") for _ in range(60))
                lines.write(json.dumps({"path": f"{split}{index}", "split": split, "text": text}) + "\n")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return Project(folder)


@pytest.fixture
def project(pristine_project: Project, tmp_path: Path) -> Project:
    """A copy that the test may change."""
    return pristine_project.copy_to(tmp_path / "project")


@pytest.fixture(scope="session")
def finished(pristine_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project run to its end once; tests that change it must copy the folder first."""
    from puzzle.cli import main

    project = pristine_project.copy_to(tmp_path_factory.mktemp("finished") / "project")
    assert main(["--debug", "run", str(project.config)]) == 0
    return project


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Project:
    """A finished run that the test may change. Its config still names the original folders, of the same content."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    text = finished.config.read_text().replace(str(finished.folder), str(tmp_path / "copy"))
    (tmp_path / "copy" / "config.yaml").write_text(text)
    return Project(tmp_path / "copy")


def offering(project: Project, sizes: str) -> Project:
    """The project with these hidden sizes to choose from."""
    project.config.write_text(project.config.read_text() + f"widths: {{sizes: {sizes}, tokens: 64}}\n")
    (project.folder / "limit.yaml").write_text(WIDTHS_LIMITS)
    grid = project.folder / "grid.yaml"
    grid.write_text(grid.read_text().replace("batch_sizes: [1]", "batch_sizes: [1, 2]"))
    return project


def copied(searched: Project, folder: Path) -> Project:
    """With all that was found: ``searched`` is shared by tests that come in any order, so none may change it."""
    project = offering(searched.copy_to(folder), '["100%", 24]')
    shutil.copytree(searched.run, project.run)
    return project


@pytest.fixture(scope="session")
def searched(pristine_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with two hidden sizes, run to its end once."""
    from puzzle.cli import main

    project = offering(pristine_project.copy_to(tmp_path_factory.mktemp("widths") / "project"), '["100%", 24]')
    assert main(["--debug", "run", str(project.config)]) == 0
    return project
