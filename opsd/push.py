"""The trained model to the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from opsd.errors import ConfigError, one_line
from opsd.options import RunConfig


def make_repository(options: RunConfig) -> None:
    """Makes the private repository `run.push_to_hub`, if one is named and unless it is there, before the run.

    Raises:
        ConfigError: the hub refuses, or cannot be reached, or nothing will be saved.
    """
    name = options.push_to_hub
    if name is not None:
        if not options.save:
            raise ConfigError(f"run.push_to_hub is {name!r}, but run.save is False; accepted: run.save true")
        try:
            HfApi().create_repo(name, private=True, exist_ok=True)
        except Exception as error:  # of the hub, of the network, of the token
            raise ConfigError(f"run.push_to_hub {name!r}: the repository cannot be made: {one_line(error)}") from error


def push(name: str, directory: Path, warn: Callable[[str], None]) -> None:
    """Uploads `directory`; the run is finished, so what fails is only warned of."""
    try:
        HfApi().upload_folder(repo_id=name, folder_path=directory, commit_message="Trained by opsd")
    except Exception as error:
        warn(f"run.push_to_hub: {one_line(error)}; by hand: hf upload {name} {directory}")
