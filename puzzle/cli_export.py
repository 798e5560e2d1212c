"""The commands that write models for others and prove that they load: ``export``'s options, ``convert``, ``verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from puzzle import artifacts
from puzzle.types import ConfigError, Format, PuzzleError

if TYPE_CHECKING:
    from puzzle.run import Run

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0")
RUNTIMES = ("transformers", "torch", "llama.cpp", "mlx-lm", "vllm", "vllm-plugin")


def add_commands(commands: Any) -> None:
    """Adds the parsers, and options to ``export``, a stage; ``commands`` is what ``add_subparsers`` returned."""
    export = commands.choices["export"]
    export.add_argument(
        "--target", action="append", choices=get_args(Format), help="the format; several (default: the config's)"
    )
    export.add_argument("--gguf-type", choices=GGUF_TYPES, help="of matrices in a GGUF file")
    export.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload it to the Hugging Face hub, as private")
    export.add_argument("--public", action="store_true", help="upload it for all to see")
    export.add_argument("--unverified", action="store_true", help="upload it though no runtime has loaded it")

    convert = commands.add_parser("convert", help="write a model folder (ours, nemotron-nas) in another format")
    convert.add_argument("model", type=Path, metavar="FOLDER", help="a Hugging Face folder, or one of nemotron-nas")
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    convert.add_argument("--target", choices=get_args(Format), required=True, help="the format")
    convert.add_argument("--gguf-type", choices=GGUF_TYPES, help="of matrices in a GGUF file (default: as they are)")
    convert.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="whose tokenizer and licence go along (default: the model's)"
    )
    convert.set_defaults(command=_convert)

    verify = commands.add_parser("verify", help="check in a clean process that an export loads as it should")
    verify.add_argument("export", type=Path, metavar="EXPORT", help="a folder that export or convert wrote")
    which = "several (default: all that read it, but for vLLM)"
    verify.add_argument("--runtime", action="append", choices=RUNTIMES, help=which)
    verify.add_argument("--python", type=Path, help="the interpreter of the environment that the runtime is in")
    verify.set_defaults(command=_verify)


def _convert(options: argparse.Namespace) -> None:
    from puzzle.export import publish
    from puzzle.export.card import Licence, converted_card
    from puzzle.export.source import Source

    if options.output.exists():
        raise ConfigError(f"{options.output} exists; choose another name")
    source, tokenizer_dir = Source.open(options.model), options.tokenizer or options.model
    name = options.model.resolve().name
    card = converted_card(name, Licence.of(tokenizer_dir), options.target, source.shape, source.layers)

    def write(aside: Path) -> dict[str, Any]:
        return publish.fill(aside, source, options.target, tokenizer_dir, card, options.gguf_type)

    unit = artifacts.publish_folder(options.output, {}, write, loose=publish.LOOSE)
    _print(unit)
    print(options.output)


def print_exports(run: Run) -> None:
    """What was exported last, and what came of checking it."""
    from puzzle.plans import plan_export

    for unit in plan_export(run):
        _print(artifacts.read_unit(unit.path))
        print(unit.path)


def check_push(run: Run, options: argparse.Namespace) -> None:
    """ConfigError where it is not clear what is to be uploaded."""
    from puzzle.plans import export_formats

    if options.push_to_hub is None:
        if options.public or options.unverified:
            raise ConfigError("--public and --unverified are of an upload; give --push-to-hub ORG/NAME, too")
    elif len(formats := export_formats(run)) > 1:
        raise ConfigError(f"--push-to-hub takes one format, and there are {', '.join(formats)}; choose with --target")


def push(run: Run, options: argparse.Namespace) -> None:
    """Uploads what was exported, where that was asked for."""
    if options.push_to_hub is None:
        return
    from puzzle.export import hub
    from puzzle.plans import plan_export

    (unit,) = plan_export(run)
    print(hub.push(unit.path, options.push_to_hub, options.public, options.unverified))


def _print(unit: artifacts.Unit) -> None:
    for one in unit.read(list[dict[str, Any]], "verification") + unit.read(list[dict[str, Any]], "others"):
        print(one["line"])


def _verify(options: argparse.Namespace) -> None:
    from puzzle.export import publish
    from puzzle.export.card import Untried
    from puzzle.export.verify import verify

    folder = options.export
    if not (folder / artifacts.MARKER).is_file():
        raise ConfigError(
            f"{folder}: no export (it has no {artifacts.MARKER}); give what `puzzle export` or `convert` wrote"
        )
    unit = artifacts.read_unit(folder)
    if unit.payload.get("format") not in publish.CHECKED_IN:
        raise ConfigError(f"{folder}: no export; give what `puzzle export` or `convert` wrote")
    artifacts.check_contents(folder)
    usual = publish.CHECKED_IN[unit.payload["format"]]
    readable = (*usual, *publish.ON_REQUEST.get(unit.payload["format"], ()))
    runtimes = options.runtime or usual
    if foreign := [runtime for runtime in runtimes if runtime not in readable]:
        raise ConfigError(
            f"--runtime {foreign[0]}: it does not read {unit.payload['format']}; what does: {', '.join(readable)}"
        )
    others = unit.read(list[Untried], "others")
    if hopeless := [one.line for one in others if one.refuses and one.runtime in runtimes]:
        raise ConfigError(f"{folder}: {hopeless[0]}")
    verdicts = [verify(folder, runtime, options.python) for runtime in runtimes]
    print("\n".join(verdict.line() for verdict in verdicts))  # first: the folder may be one that cannot be written
    publish.note_verdicts(folder, verdicts, others)
    if failed := [verdict.runtime for verdict in verdicts if verdict.status == "failed"]:
        raise PuzzleError(f"{folder}: does not load as it should in {', '.join(failed)}")
