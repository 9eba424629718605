"""The wheel's contents, the doctests and the README's commands, all read off the folders."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]


def modules() -> list[str]:
    names = []
    for package in sorted(FOLDERS):
        names.append(package)
        path = importlib.import_module(package).__path__
        names += [module.name for module in pkgutil.walk_packages(path, package + ".")]
    return names


def test_every_package_folder_is_in_the_wheel() -> None:
    on_disk = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert on_disk == set(SETUPTOOLS["packages"])


def test_every_folder_with_code_is_a_package() -> None:
    for folder in FOLDERS.values():
        for source in (ROOT / folder).rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), (
                f"{source.parent} has no __init__.py: the wheel would lack it"
            )


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def project_files() -> set[str]:
    """The files of the five folders, as git sees them: tracked, or new and not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run([*command, *FOLDERS.values()], capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel, built from a copy of the project's files, so that no build folder is left in the repository."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git and a clone, to know which files belong to the project")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in [*project_files(), "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--disable-pip-version-check", "-w", str(out), str(source)], check=True)
    return zipfile.Path(next(out.glob("*.whl")))


def test_the_wheel_holds_every_file(wheel: zipfile.Path) -> None:
    """Code, type markers, page assets and bundled targets; README files of the folders are for developers."""
    names = set(wheel.root.namelist())
    expected = {f"kvtwin/{name}" for name in project_files() if Path(name).name != "README.md"}
    assert expected <= names, f"missing: {sorted(expected - names)}"
    assert {"kvtwin/reports/assets/page.css", "kvtwin/reports/assets/page.js", "kvtwin/sim/py.typed"} <= names


def test_the_wheel_imports_by_itself(wheel: zipfile.Path, tmp_path: Path) -> None:
    wheel.root.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    # The editable install finds kvtwin through a hook: without it, only the wheel is left.
    code += "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    code += "import importlib\n"
    code += f"for name in {modules()!r}:\n    module = importlib.import_module(name)\n"
    code += f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def readme_commands(program: str) -> set[str]:
    """First words after `program` in the README's code blocks: subcommands of kvtwin, targets of make."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    pattern = rf"^\s*(?:\$ )?(?:\.venv/bin/)?{program} ([a-z]+)\b"
    return {word for block in blocks for word in re.findall(pattern, block, re.MULTILINE)}


def test_the_commands_of_the_readme_exist() -> None:
    from kvtwin.reports.cli import main

    named = readme_commands("kvtwin")
    assert {"calibrate", "simulate", "check"} <= named
    for command in named:
        assert main([command, "--help"]) == 0, f"the README names `kvtwin {command}`"


def test_the_make_targets_of_the_readme_exist() -> None:
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= readme_commands("make") <= rules
