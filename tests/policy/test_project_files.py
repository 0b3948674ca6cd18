"""The files around the code: the lock, the changelog, the licence, and what no file may say."""

import hashlib
import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
ENTRIES = {"hardmoe", "pipelines", "cluster", "tests", "README.md", "pyproject.toml"}
BESIDE = {"Makefile", "CHANGELOG.md", "LICENSE", "requirements.lock"}
_GENERATED = {".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Of the licence as www.apache.org/licenses/LICENSE-2.0.txt has it, appendix included."""

# Spelled in pieces, so that this file does not find itself.
_TOPS = "|".join(["work", "root", "home"])
_HOSTS = ["file:" + "///[a-z]", "pypi" + r"\.", "python" + "hosted", "/sim" + "ple/"]
# At the start of a path only: tests have directories of their own called root.
_PRIVATE = re.compile("|".join([rf"(?<![\w.*)}}-])/(?:{_TOPS})/", *_HOSTS]))
_UNFINISHED = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX"]))


def _project_files() -> list[Path]:
    """What belongs to the project: tracked files and those that git would add; without git, all but hidden folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode == 0 and listing.stdout:
        names = listing.stdout.split("\0")
    else:
        tops = [top for top in REPOSITORY.iterdir() if top.name not in _GENERATED]
        files = [path.relative_to(REPOSITORY) for top in tops for path in (top, *top.rglob("*"))]
        names = [str(path) for path in files if not _GENERATED & set(path.parts)]
    return [path for name in names if name and (path := REPOSITORY / name).is_file()]


def _pyproject() -> dict[str, object]:
    body: dict[str, object] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    return body


def _locked() -> dict[str, tuple[str, str]]:
    """Package to its version and its marker, as the lock has them."""
    locked = {}
    for line in (REPOSITORY / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==" and "*" not in pin.version, f"not an exact version: {line}"
            locked[canonicalize_name(requirement.name)] = (pin.version, str(requirement.marker or ""))
    return locked


def _wanted() -> list[Requirement]:
    """Everything that pyproject.toml asks for, for running, testing, developing and building."""
    body = _pyproject()
    project, build = body["project"], body["build-system"]
    assert isinstance(project, dict) and isinstance(build, dict)
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    return [Requirement(text) for text in [*project["dependencies"], *extras, *build["requires"]]]


def test_lock_has_an_allowed_exact_version_of_everything_asked_for() -> None:
    locked = _locked()
    for requirement in _wanted():
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but the lock has {version}; make lock"


def test_lock_installs_exactly_one_faiss_on_every_platform() -> None:
    """Both packages install the module `faiss`, and the second would overwrite half of the first."""
    locked = _locked()
    markers = {Requirement(f"x; {locked[name][1]}").marker for name in ("faiss-cpu", "faiss-gpu")}
    for system in ("Linux", "Darwin", "Windows"):
        for machine in ("x86_64", "aarch64", "arm64"):
            environment = {"platform_system": system, "platform_machine": machine}
            assert sum(marker is not None and marker.evaluate(environment) for marker in markers) == 1, environment


def test_lower_bounds_are_stated_and_nothing_is_capped() -> None:
    """The lock says what was tested; an upper bound in pyproject.toml would only get in the way of whoever installs it."""
    for requirement in _wanted():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">="}, f"{requirement}: state a lower bound and no other"


def test_root_holds_only_the_agreed_entries() -> None:
    tops = {path.relative_to(REPOSITORY).parts[0] for path in _project_files()}
    assert {top for top in tops if not top.startswith(".")} - BESIDE == ENTRIES
    assert tops >= BESIDE


def test_licence_is_the_complete_unmodified_text() -> None:
    assert hashlib.sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256


def test_changelog_begins_with_what_is_not_released_yet() -> None:
    headings = re.findall(r"^## (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d{2}-\d{2}\)", heading) for heading in headings[1:])


def test_no_file_names_a_machine_a_package_host_or_something_left_undone() -> None:
    found = []
    for path in _project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if path.name != "LICENSE":
            found += [f"{path}: {match[0]}" for match in (*_PRIVATE.finditer(text), *_UNFINISHED.finditer(text))]
    assert found == []


def test_repository_holds_no_large_and_no_generated_file() -> None:
    files = _project_files()
    assert [path for path in files if path.stat().st_size > 500_000] == []
    assert [path for path in files if path.suffix in {".parquet", ".safetensors", ".pyc", ".pt", ".npy", ".whl"}] == []


def test_check_of_every_change_is_executable_and_runs_the_tests() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text() and "test" in script.read_text().split("make", 1)[1]


def test_warnings_are_errors_and_the_types_are_strict() -> None:
    tool = _pyproject()["tool"]
    assert isinstance(tool, dict)
    assert tool["pytest"]["ini_options"]["filterwarnings"] == ["error"]
    assert tool["mypy"]["strict"] is True and tool["mypy"]["files"] == ["hardmoe"]
    banned = tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert {"ray", "faiss", "click", "boto3", "pickle"} <= set(banned)
