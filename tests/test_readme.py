"""What the README says of the tree and the command line is so."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

from editeval.__main__ import _parser

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


def tree() -> list[str]:
    """Return the paths of the file tree: indented names lie in the folder above them."""
    (block,) = (part for part in README.split("```") if part.strip().startswith("launch.py            "))
    paths, folder = [], ""
    for line in block.strip().splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        inside = line.startswith("  ")
        if not inside:
            folder = names[0] if names[0].endswith("/") else ""
        paths += [(folder if inside else "") + name for name in names]
    return paths


def test_every_path_of_the_tree_exists() -> None:
    for path in tree():
        assert (REPOSITORY / path).exists(), path


def test_every_room_is_in_the_tree() -> None:
    rooms = {f"editeval/{path.name}" + ("/" if path.is_dir() else "") for path in (REPOSITORY / "editeval").iterdir()}
    rooms = {
        room
        for room in rooms
        if not room.rsplit("/", 1)[-1].startswith("_") and "__pycache__" not in room and not room.endswith("py.typed")
    }
    assert rooms <= set(tree()), rooms - set(tree())


def test_every_folder_and_document_is_in_the_tree() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] + ("/" if "/" in path else "") for path in tracked if not path.startswith(".")}
    missing = top - set(tree()) - {"README.md", "LICENSE", "pyproject.toml"}
    assert not missing, missing


def test_every_command_is_in_the_readme_and_in_the_help_of_launch() -> None:
    help_text = (REPOSITORY / "conf" / "hydra" / "help" / "editeval.yaml").read_text()
    listed = re.search(r"python -m editeval (.+)", help_text)
    assert listed is not None
    (commands,) = (action.choices for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(listed[1].split(" | ")) == set(commands)
    for command in commands:
        assert f"python -m editeval {command} " in README, command


def test_every_picture_and_file_that_is_linked_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_every_method_dataset_and_benchmark_is_named() -> None:
    for group in ("method", "dataset", "benchmark"):
        for path in (REPOSITORY / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in README, f"{group} {path.stem} is not in the README"
