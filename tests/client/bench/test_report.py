"""The machine's name beside the figures, and tables."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from pem import __version__
from pem.bench import report
from pem.bench.report import Table, cpu_model, in_words, machine, machine_line, write_json

FOUND = {
    "cpu": "AMD EPYC 9654",
    "cores": 2,
    "memory_mb": 25276,
    "device": "2 x NVIDIA H200",
    "version": "0.1.0",
    "commit": "c17c38de5b",
}


def test_the_machine_is_named_with_what_this_process_may_use_of_it():
    found = machine()
    assert found["cores"] <= len(os.sched_getaffinity(0))
    assert found["version"] == __version__
    assert machine_line() == in_words(found)
    assert str(found["cpu"]) in machine_line()


def test_a_line_tells_what_is_known():
    assert in_words(FOUND) == "AMD EPYC 9654, 2 cores, 25.3 GB, 2 x NVIDIA H200, pem 0.1.0 at c17c38de5b"
    little = {**FOUND, "cpu": None, "cores": 1, "memory_mb": None, "device": "cpu", "commit": None}
    assert in_words(little) == "1 core, no GPU, pem 0.1.0"


@pytest.mark.parametrize(
    "text, name",
    [
        (
            "processor\t: 0\nmodel\t\t: 17\nmodel name\t: Intel(R)  Xeon(R) CPU\nmodel name\t: other\n",
            "Intel(R) Xeon(R) CPU",
        ),
        ("processor\t: 0\nBogoMIPS\t: 108.00\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("processor\t: 0\n", os.uname().machine),
    ],
)
def test_a_processor_is_called_what_it_calls_itself(tmp_path: Path, text: str, name: str):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_model(tmp_path / "cpuinfo") == name


def test_where_processors_are_not_told_there_is_none(tmp_path: Path):
    assert cpu_model(tmp_path / "cpuinfo") is None


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    "script, device",
    [
        ("echo NVIDIA H200", "NVIDIA H200"),
        ("printf 'NVIDIA L4\\nNVIDIA L4\\nNVIDIA H200\\n'", "2 x NVIDIA L4, NVIDIA H200"),
        ("echo NVIDIA-SMI has failed; exit 9", "cpu"),
    ],
)
def test_gpus_are_named_as_their_driver_does(tmp_path: Path, monkeypatch, script: str, device: str):
    program(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine()["device"] == device


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_that_of_a_checkout_and_says_whether_files_differ(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert machine()["commit"] is None, "an installed package has none"

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    assert machine()["commit"] == git("rev-parse", "HEAD")[:10]
    (tmp_path / "file").write_text("2")
    assert machine()["commit"] == git("rev-parse", "HEAD")[:10] + "-dirty"


def test_figures_are_written_with_the_machine(tmp_path: Path):
    write_json(str(tmp_path / "figures.json"), {"figure": 3})
    told = msgspec.json.decode((tmp_path / "figures.json").read_bytes())
    assert told == {"machine": machine(), "figure": 3}


def test_what_is_not_known_is_a_dash_in_a_table_and_null_for_a_machine(capsys):
    table = Table(["rate", "p99 ms"])
    table.add(1.23456, None)
    table.print()
    assert capsys.readouterr().out == "rate  p99 ms\n1.23       -\n"
    assert table.as_dicts() == [{"rate": 1.23456, "p99 ms": None}]
