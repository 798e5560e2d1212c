"""Uploads a finished export to the Hugging Face hub: privately, and what was verified, unless told otherwise.

Reads a published folder, every file of which is held against its checksum first; writes nothing here.
"""

from __future__ import annotations

from pathlib import Path

from puzzle import artifacts
from puzzle.export.publish import VERDICTS
from puzzle.types import ConfigError, PuzzleError


def push(folder: Path, repo: str, public: bool = False, unverified: bool = False) -> str:
    """The address of what was uploaded.

    PuzzleError where a runtime failed on the export or, unless ``unverified``, none has loaded it; ConfigError where
    the hub does not let it in, or ``repo`` is there already, for all to see, and ``public`` was not said.
    """
    artifacts.check_contents(folder)
    _check_verdicts(folder, unverified)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ConfigError(f"{repo} is public: say --public, or name another repository")
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="puzzle export"))
    except HFValidationError:
        said = "no name of a repository; write ORGANISATION/NAME"
    except GatedRepoError:
        said = "gated; accept its terms on the hub and run `hf auth login`"
    except LocalTokenNotFoundError:
        said = "not to be written without a token; run `hf auth login`"
    except HfHubHTTPError as error:
        said = f"not to be written ({_first_line(error)})"
        if error.response is not None and error.response.status_code in (401, 403):
            said = "not to be written with your token; run `hf auth login` with one that may write there"
    except PuzzleError:
        raise
    except Exception as error:  # the hub client raises whatever its HTTP library does
        said = f"not to be reached ({_first_line(error)})"
    raise ConfigError(f"--push-to-hub: {repo} is {said}")


def _check_verdicts(folder: Path, unverified: bool) -> None:
    verdicts = artifacts.read_json(folder / VERDICTS)["verdicts"]
    if failed := [one["line"] for one in verdicts if one["status"] == "failed"]:
        raise PuzzleError(f"{folder} is not uploaded: {failed[0]}")
    if not unverified and all(one["status"] != "passed" for one in verdicts):
        raise PuzzleError(
            f"{folder} is not uploaded: no runtime has loaded it; run `puzzle verify {folder}`, or say --unverified"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
