"""The rows of the engines: they agree with each other, and no other code decides by an engine's name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from posekit import registry
from posekit.engine import EngineSpec
from posekit.settings import WeightsTable
from serve.settings import Settings
from workers.settings import Stages

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "pointnet2_ext", "posekit", "serve", "workers")
each_engine = pytest.mark.parametrize("spec", registry.ENGINES, ids=lambda spec: spec.name)


def test_auto_prefers_the_network_and_lists_name_the_quickest_first() -> None:
    assert [spec.name for spec in registry.ENGINES] == ["sam6d", "geometric"]
    assert registry.names() == ("geometric", "sam6d")
    assert registry.needing_nothing() == "geometric"


def test_names_and_stages_are_each_one_engines_own() -> None:
    for values in ([spec.name for spec in registry.ENGINES], [spec.onboard_stage for spec in registry.ENGINES]):
        assert len(set(values)) == len(values)


@each_engine
def test_a_row_can_be_used_in_files_routes_variables_and_labels(spec: EngineSpec) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
    assert re.fullmatch(r"onboard(_[a-z0-9_]+)?", spec.onboard_stage)
    assert spec.words
    assert spec.licence
    assert spec.weights_licence
    assert spec.effort > 0


@each_engine
def test_the_engines_that_a_row_counts_on_can_always_be_had(spec: EngineSpec) -> None:
    for name in (spec.refiner, spec.symmetries_from):
        assert name is None or registry.spec(name).weights is None
    last = registry.spec(registry.standing_in(spec.name, registry.names()))  # with all of them lost
    assert last.stand_in is None
    assert last.weights is None


@each_engine
def test_weights_come_with_the_settings_that_name_their_file(spec: EngineSpec) -> None:
    has_table = spec.settings is not None and issubclass(spec.settings, WeightsTable)
    assert has_table == (spec.weights is not None)


def test_the_settings_have_a_table_for_each_engine_that_wants_one_and_none_hides_another() -> None:
    for struct in (Settings, Stages):
        fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
        tables = {spec.name: spec.settings for spec in registry.ENGINES if spec.settings is not None}
        assert {name: fields[name] for name in tables} == tables
        assert not set(registry.names()) & (fields.keys() - tables.keys())


def test_an_unknown_engine_is_named_beside_those_there_are() -> None:
    with pytest.raises(ValueError, match="'magic'; there are: geometric, sam6d"):
        registry.spec("magic")


def test_an_engine_brings_those_that_it_counts_on() -> None:
    assert registry.company("sam6d") == ("sam6d", "geometric")
    assert registry.company("geometric") == ("geometric",)


def test_stand_ins_answer_for_the_engines_that_are_lost() -> None:
    assert registry.standing_in("sam6d", {}) == "sam6d"
    assert registry.standing_in("sam6d", {"sam6d"}) == "geometric"
    assert registry.standing_in("geometric", {"sam6d"}) == "geometric"


# ---- nothing else decides by a name


def names_compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each comparison, membership test or case with an engine's name as a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        literals = [
            element
            for part in parts
            for element in (part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part])
        ]
        for literal in literals:
            if isinstance(literal, ast.Constant) and literal.value in registry.names():
                yield node.lineno, literal.value


@pytest.mark.parametrize(
    "code",
    [
        "x == 'sam6d'",
        "'geometric' != x",
        "'sam6d' in x",
        "x in ('sam6d', 'y')",
        "x not in {'geometric'}",
        "match x:\n case 'sam6d' | 'y': pass",
    ],
)
def test_comparisons_are_found_in_all_their_forms(code: str) -> None:
    assert len(list(names_compared(ast.parse(code)))) == 1


def test_no_file_outside_the_engines_and_the_registry_compares_an_engines_name() -> None:
    own = [ROOT / "posekit/registry.py", *(ROOT / "posekit" / name for name in registry.names())]
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if not any(path == mine or path.is_relative_to(mine) for mine in own):
            found += [
                f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in names_compared(ast.parse(path.read_text()))
            ]
    assert found == []
