"""The versions that pyproject.toml allows, constraints.txt pins and scripts/test installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_pin_is_allowed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    allowed = [
        Requirement(line)
        for line in chain(project["dependencies"], *project["optional-dependencies"].values())
    ]
    specifiers = {canonicalize_name(each.name): each.specifier for each in allowed}
    for pin in pins():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert exact.version in specifiers.get(canonicalize_name(pin.name), pin.specifier), str(pin)
    pinned = {canonicalize_name(pin.name) for pin in pins()}
    assert {canonicalize_name(Requirement(line).name) for line in project["dependencies"]} <= pinned


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_no_package_is_pinned_twice_for_one_python(python: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    names = [pin.name for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    assert len(names) == len(set(names))
    assert "torch" in names


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
@pytest.mark.parametrize("versions", [[], ["oldest"]])
def test_other_versions_are_refused(versions: list[str]) -> None:
    refused = subprocess.run(
        ["sh", "scripts/test", "--versions", *versions],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "--versions takes lowest, pinned or newest.\n"
