"""The comparison of two versions finds what differs between them, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.versions import run as versions

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_changed_status_is_found_and_everything_else_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, figures = tmp_path / "changed", tmp_path / "figures.json"
    for package in ("client", "serve", "workers", "posekit", "pointnet2_ext"):
        shutil.copytree(ROOT / package, changed / package, ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    table = changed / "serve/errors.py"
    text = table.read_text()
    assert text.count('"method_not_allowed": (405,') == 1
    table.write_text(text.replace('"method_not_allowed": (405,', '"method_not_allowed": (400,'))
    arguments = ["--old", str(ROOT), "--new", str(changed), "--requests-only", "--groups", "404 and 405"]
    assert versions.main([*arguments, "--json", str(figures)]) == 1
    assert "the versions DIFFER" in capsys.readouterr().out
    rows = [row for row in json.loads(figures.read_text())["results"] if row["group"] == "404 and 405"]
    different = {row["name"] for row in rows if row["verdict"] != "same"}
    assert "PUT /api/v1/objects" in different
    assert {row["name"] for row in rows} - different >= {"GET /api/v1/nothing", "GET /api"}
