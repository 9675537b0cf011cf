"""Comparing several settings in one run: the command line, and the order of turns."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.service import trials


def parsed(*arguments: str, usual: tuple[str, ...] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    trials.add_set(parser)
    trials.add_try(parser, usual)
    return parser.parse_args(arguments)


def test_settings_are_read_by_name() -> None:
    assert trials.settings_of("pose.workers=1, pose.threads=2") == {"pose.workers": "1", "pose.threads": "2"}
    assert trials.settings_of("defaults") == {}


@pytest.mark.parametrize(
    "text, words", [("pose.workers", "write NAME=VALUE"), ("pose.legs=4", "no setting 'pose.legs'")]
)
def test_a_setting_that_there_is_not_is_refused_before_anything_starts(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--set", "--try"):
        with pytest.raises(SystemExit):
            parsed(option, text)
        assert words in capsys.readouterr().err


def test_what_is_tried_stands_beside_the_defaults_and_what_is_set_is_for_all() -> None:
    options = parsed("--set", "pose.workers=1", "--set", "pose.workers=2", "--try", "pose.pass_detections=8")
    assert trials.given(options) == {"pose.workers": "2"}
    assert trials.compared(options) == ["defaults", "pose.pass_detections=8"]
    assert trials.compared(parsed()) == ["defaults"]
    assert trials.compared(parsed(usual=("decode.workers=1",))) == ["defaults", "decode.workers=1"]


def test_each_round_begins_with_the_next() -> None:
    turns = list(trials.in_turns(["a", "b", "c"], 4))
    assert [number for number, _ in turns] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert "".join(name for _, name in turns) == "abcbcacababc"
    assert list(trials.in_turns([], 2)) == []
