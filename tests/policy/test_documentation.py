"""The README under test: every `hardmoe …` command in it is run, in the order of the page, by a stranger with 500 images.

A block's info string says what it is: `sh` is run, `sh server` is started, asked whether it is ready, and ended, `sh cluster`
needs a running Ray cluster, `sh object-store` a bucket, and neither is, `python` is run, `yaml` is a recipe whose first line
names its file. A command that must fail says so: `# exit code 1`. The shipped recipes are replaced by shrunken ones (their keys
over another collection and fewer steps), as what is tested is the page.
"""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import SMALL, merged, real_images, write_photos

from hardmoe.cli.main import cli
from hardmoe.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_EXIT_CODE = re.compile(r"# exit code (\d+)")
_NOT_OURS = ("make ", "git clone ", "cd ", "source ")
_SHELL = {"sh", "sh server", "sh cluster", "sh object-store"}
_QUICK: dict[str, Any] = {"experts": {"epochs": 1}, "evaluation": {"random_partition": False}, "execution": {"backend": "inline"}}

_DETECTION: dict[str, Any] = {
    "root": "runs/detection",
    "dataset": {"source": "parquet", "path": "icons/*.parquet"},
    "canvases": {"size": 64, "num_train": 16, "num_test": 8, "num_classes": 1, "sizes": [[8, 10], [16, 22], [30, 50]]},
    "detector": {"width": 4, "channels": 8, "depth": 1},
    "bootstrap_replicates": 10,
    "execution": {"backend": "inline"},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file."""

    info: str
    body: str

    @property
    def commands(self) -> list[str]:
        """Its lines, with continuations joined, without empty lines and comments."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _blocks(path: Path) -> list[Block]:
    return [Block(match["info"].strip(), match["body"]) for match in _FENCE.finditer(path.read_text())]


def _prepare(directory: Path) -> dict[str, str]:
    """A place like a fresh clone but for small recipes, with pictures to be packed; returns the environment."""
    recipes = directory / "pipelines"
    recipes.mkdir()
    examples = real_images(500)
    write_photos(directory / "icons", examples)
    data = {"demo.yaml": {"dataset": {"source": "parquet", "path": "icons/*.parquet"}}, "parquet.yaml": {}}
    for name, changes in data.items():
        shipped = yaml.safe_load((REPOSITORY / "pipelines" / name).read_text())
        small = {key: value for key, value in SMALL.items() if key != "dataset"}
        body = merged(merged(merged(shipped, small), _QUICK), changes)
        body["dataset"] = {**SMALL["dataset"], **body["dataset"], "shard_rows": 512}
        (recipes / name).write_text(yaml.safe_dump(body))
    (recipes / "detection.yaml").write_text(yaml.safe_dump(_DETECTION))
    (directory / "pictures").mkdir()
    pictures = {f"{number:04d}.png": example for number, example in enumerate(examples)}
    for name, example in pictures.items():
        (directory / "pictures" / name).write_bytes(example.image)
    rows = [f"{name},{' '.join(example.tags)}" for name, example in pictures.items()]
    (directory / "tags.csv").write_text("\n".join(["path,hashtags", *rows]) + "\n")
    script = directory / "bin" / "hardmoe"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom hardmoe.cli.main import main\nmain()\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}


def _run(arguments: Sequence[str], directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


def _serve(commands: Sequence[str], directory: Path, environment: dict[str, str]) -> int:
    """Start a server, wait until it is ready, end it; returns 1."""
    (command,) = commands
    port = int(command.rpartition("--port ")[2])
    with subprocess.Popen(command.split(), cwd=directory, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = server.stderr.readline()
        until = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, told + server.stderr.read()
                threading.Event().wait(0.1)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130), server.stderr.read()
    return 1


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_readme_runs_from_top_to_bottom_as_it_stands(tmp_path: Path) -> None:
    environment = _prepare(tmp_path)
    num_run = 0
    for block in _blocks(README):
        if block.info == "yaml":
            (tmp_path / block.body.splitlines()[0].removeprefix("# ")).write_text(block.body)
        elif block.info == "python":
            result = _run([sys.executable, "-W", "error", "-c", block.body], tmp_path, environment)
            assert result.returncode == 0, f"{block.body}\n{result.stderr}"
        elif block.info == "sh server":
            num_run += _serve(block.commands, tmp_path, environment)
        for command in block.commands if block.info == "sh" else []:
            if command.startswith(_NOT_OURS):
                continue
            expected = int(match[1]) if (match := _EXIT_CODE.search(command)) else 0
            result = _run(["bash", "-c", command], tmp_path, environment)
            assert result.returncode == expected, f"$ {command}\n{result.stdout}\n{result.stderr}"
            assert "Traceback" not in result.stderr
            num_run += 1
    assert num_run >= len(cli.commands)


def test_readme_says_of_every_block_what_it_is() -> None:
    """An untagged block with a command in it would be a command that no test runs."""
    for block in _blocks(README):
        assert block.info in {*_SHELL, "python", "yaml", "text"}, f"{block.info!r}: {block.body[:60]}"
        if block.info in _SHELL:
            strangers = [line for line in block.commands if not line.startswith(("hardmoe ", *_NOT_OURS))]
            assert strangers == []
        elif block.info == "text":
            assert not re.search(r"^\s*(\$ )?hardmoe ", block.body, re.MULTILINE), block.body


def test_readme_leaves_only_what_needs_a_cluster_or_a_bucket_unrun() -> None:
    for info, needs in (("sh cluster", "--address"), ("sh object-store", "s3://")):
        commands = [command for block in _blocks(README) if block.info == info for command in block.commands]
        assert commands and all(needs in command for command in commands if command.startswith("hardmoe ")), commands


def test_readme_shows_every_command_and_every_make_target() -> None:
    text = README.read_text()
    missing = [name for name in cli.commands if not re.search(rf"hardmoe {name}\b", text)]
    assert missing == []
    targets = re.findall(r"^([a-z0-9-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert [target for target in targets if target != "help" and f"make {target}" not in text] == []


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("[A-Zacpt]*/**/*.md")) + sorted(REPOSITORY.glob("*.md")), ids=str)
def test_relative_link_of_a_page_leads_to_a_file(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    broken = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert broken == []


def test_readme_names_the_vocabulary_before_the_commands() -> None:
    text = README.read_text()
    assert text.index("## Vocabulary") < text.index("## Recipes") < text.index("## Commands")
    assert "## Vocabulary" in text[: text.index("from hardmoe")]


def test_recipe_keys_named_in_the_readme_exist() -> None:
    """`section.key` in backticks is a promise about the recipe's keys."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)`", README.read_text()):
        if section in sections:
            assert key in sections[section].model_fields, f"{section}.{key}"  # type: ignore[union-attr]
