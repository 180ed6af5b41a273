"""Java and Maven: the check that they are here, and jars by their coordinates."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services import commands
from tests.services.errors import Missing, ServiceError

if TYPE_CHECKING:
    from collections.abc import Sequence

JAVA_AT_LEAST = 17
DOWNLOAD_TIMEOUT_S = 900
ATTEMPTS = 2  # a registry may hiccup

POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId>
  <artifactId>jars</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
{dependencies}
  </dependencies>
</project>
"""
DEPENDENCY = (
    "    <dependency><groupId>{0}</groupId><artifactId>{1}</artifactId><version>{2}</version></dependency>".format
)


def missing() -> list[Missing]:
    """What a server written in Java lacks on this machine."""
    lacking = []
    version = java_version()
    if version is None or version < JAVA_AT_LEAST:
        found = "none is on PATH" if version is None else f"this is {version}"
        lacking.append(
            Missing(
                f"Java {JAVA_AT_LEAST} or later ({found})", "apt-get install openjdk-17-jre-headless, or a newer JDK"
            )
        )
    if shutil.which("mvn") is None:
        lacking.append(Missing("Maven (mvn is not on PATH)", "apt-get install maven"))
    return lacking


def copy_jars(coordinates: Sequence[str], into: Path) -> None:
    """Fetch ``group:artifact:version`` with everything they depend on into ``into/libs``.

    The pom lies beside them, so that a reader of the cache sees where they came from.

    Raises:
        ServiceError: Maven failed; its output is in the message.
    """
    pom = into / "pom.xml"
    pom.write_text(POM.format(dependencies="\n".join(DEPENDENCY(*name.split(":")) for name in coordinates)))
    command = ["mvn", "--batch-mode", "--quiet", "--update-snapshots", "--file", str(pom)]
    command += ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={into / 'libs'}"]
    _fetch(command, f"Maven could not fetch {', '.join(coordinates)}")


def unpack(coordinate: str, members: str, into: Path) -> Path:
    """Fetch the archive ``group:artifact:version:zip`` and unpack what matches ``members``; returns ``into``.

    Maven's copy of the archive is thrown away: it may be a hundred times what is wanted of it.

    Raises:
        ServiceError: Maven failed; its output is in the message.
    """
    with tempfile.TemporaryDirectory(dir=into) as repository:
        pom = Path(repository) / "pom.xml"  # a project of its own, or Maven leaves a marker in the working directory
        pom.write_text(POM.format(dependencies=""))
        command = ["mvn", "--batch-mode", "--quiet", f"-Dmaven.repo.local={repository}", "--file", str(pom)]
        command += ["dependency:unpack", f"-Dartifact={coordinate}", f"-Dmdep.unpack.includes={members}"]
        command.append(f"-DoutputDirectory={into}")
        _fetch(command, f"Maven could not fetch {coordinate}")
    return into


def java_home() -> Path:
    """Where the Java on PATH lives.

    Raises:
        ServiceError: There is none.
    """
    found = shutil.which("java")
    if found is None:
        raise ServiceError("; ".join(map(str, missing())))
    return Path(found).resolve().parent.parent


def _fetch(command: Sequence[str], problem: str) -> None:
    for left in reversed(range(ATTEMPTS)):
        try:
            commands.run(command, DOWNLOAD_TIMEOUT_S, problem)
        except ServiceError as error:
            if not left or error.__cause__ is not None:  # it is not there, or took too long already
                raise
        else:
            return


def java_version() -> int | None:
    """The major version of the Java on PATH, or None."""
    try:
        said = subprocess.run(
            ["java", "-version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
        ).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "(\d+)', said)
    return int(found.group(1)) if found else None
