"""The wheel holds the project, under the names by which it is imported, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "celery_kafka_backend"
MAPPED = {PACKAGE: PACKAGE, **{folder: f"{PACKAGE}/{folder}" for folder in ("producer", "processors", "sinks")}}
SHIPPED = {".py", ".typed", ".lua", ".sql"}
NEEDED_TO_BUILD = ("pyproject.toml", "README.md", "LICENSE")


def sources() -> list[Path]:
    """Return the files of the four folders that are, or can be, committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *MAPPED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("this is not a git checkout")
    names = {Path(name) for name in listing.stdout.split("\0") if name}
    return sorted(name for name in names if name.suffix in SHIPPED and (ROOT / name).is_file())


def imported_as(source: Path) -> str:
    """Return where a file of the checkout belongs in the wheel."""
    folder, *rest = source.parts
    return "/".join([MAPPED[folder], *rest])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a copy: a build leaves its folders behind, and two must not share them."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*map(Path, NEEDED_TO_BUILD), *sources()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for folder in MAPPED.keys() - {PACKAGE}:
        (copy / PACKAGE / folder).symlink_to(f"../{folder}")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", *isolation(), "--outdir", str(copy / "dist"), str(copy)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert built.returncode == 0, built.stdout
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def isolation() -> list[str]:
    """Build with the setuptools that is installed, if it knows our pyproject.toml: that spares a download."""
    try:
        known = int(metadata.version("setuptools").partition(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        known = False
    return ["--no-isolation"] if known else []


def test_the_wheel_holds_every_module_under_its_import_name(wheel) -> None:
    """Not one less, and not one more."""
    assert sorted(wheel) == sorted(map(imported_as, sources()))


def test_the_wheel_takes_no_name_that_a_user_may_have(wheel) -> None:
    """A user's own ``producer.py``, and another distribution's ``sinks/``, are theirs."""
    assert {name.partition("/")[0] for name in wheel} == {PACKAGE}
