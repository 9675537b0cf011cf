"""What counts as a right answer under load."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from pem.bench import judge as judging
from pem.bench.judge import Judge, Limits, UnreadableAnswer, Verdict, error_code, refusal_in_words
from pem.bench.sample import Question
from posekit.engine import Symmetries
from tests.client.bench.pose_fake import answer, pose, question

JSON, MSGPACK = "application/json", "application/msgpack"
HALF_TURN = Symmetries(discrete=(np.diag([-1.0, -1.0, 1.0, 1.0]),))
ROUND = Symmetries(continuous=((np.array([0.0, 0, 1]), np.zeros(3)),))


def encoded(tree: dict[str, Any]) -> bytes:
    return msgspec.json.encode(tree)


def verdict(asked: Question, alone: dict[str, Any], now: dict[str, Any], **how: Any) -> Verdict:
    """Return the verdict on an answer under load, after that answer alone."""
    judge = Judge([asked], **how)
    judge.learn(0, encoded(alone), JSON)
    return judge.verdict(0, judge.hear(0, encoded(now), JSON))


def test_the_known_pose_is_right():
    assert verdict(question(pose()), answer(pose()), answer(pose())) == Verdict(detections=1, poses=1)


def test_a_pose_that_only_load_makes_wrong_is_found():
    found = verdict(question(pose(), pose(50)), answer(pose(), pose(50)), answer(pose(), pose(56)))
    assert found == Verdict(detections=2, poses=2, wrong=1, changed=1)


def test_two_rows_that_changed_places_are_both_wrong():
    found = verdict(question(pose(), pose(50)), answer(pose(), pose(50)), answer(pose(50), pose()))
    assert (found.wrong, found.changed) == (2, 2)


@pytest.mark.parametrize("off, wrong", [(pose(4.9), 0), (pose(5.1), 1), (pose(0, 4.9), 0), (pose(0, 5.1), 1)])
def test_the_limits_are_millimetres_and_degrees(off, wrong):
    assert verdict(question(pose()), answer(pose()), answer(off), compare_alone=False).wrong == wrong


def test_other_limits_can_be_set():
    limits = Limits(mm=10, deg=10)
    assert verdict(question(pose()), answer(pose()), answer(pose(8, 8)), limits=limits, compare_alone=False).wrong == 0


def test_a_symmetric_pose_is_right_and_the_same_as_alone():
    for symmetries, turn in ((HALF_TURN, 180.0), (ROUND, 77.0)):
        asked = question(pose(), symmetries=symmetries)
        assert verdict(asked, answer(pose()), answer(pose(0, turn))) == Verdict(detections=1, poses=1)
    assert verdict(question(pose(), symmetries=HALF_TURN), answer(pose()), answer(pose(0, 90))).wrong == 1


def test_a_pose_that_is_right_but_another_than_alone_has_changed():
    found = verdict(question(pose()), answer(pose(1)), answer(pose(1.1)))
    assert (found.wrong, found.changed) == (0, 1)
    assert verdict(question(pose()), answer(pose(1)), answer(pose(1.005, 0.005))).changed == 0
    assert verdict(question(pose()), answer(pose(1)), answer(pose(1.1)), compare_alone=False).changed == 0


def test_a_pose_that_load_loses_is_lost_and_has_changed():
    found = verdict(question(pose(), pose(50)), answer(pose(), pose(50)), answer(pose(), None))
    assert found == Verdict(detections=2, poses=1, rejected=1, changed=1, lost=1)


@pytest.mark.parametrize("truth", [pose(50), None])
def test_a_pose_that_load_loses_is_counted_also_where_rows_may_differ_from_those_alone(truth):
    asked = question(pose(), truth)
    found = verdict(asked, answer(pose(), pose(50)), answer(pose(), None), compare_alone=False)
    assert found == Verdict(detections=2, poses=1, rejected=1, lost=1)
    short = verdict(asked, answer(pose(), pose(50)), answer(), compare_alone=False)
    assert (short.detections, short.lost) == (0, 2)


def test_what_has_no_right_pose_alone_cannot_be_lost():
    asked = question(pose(), pose(50))
    alone = answer(pose(20), None)
    assert verdict(asked, alone, answer(None, None), compare_alone=False).lost == 0


def test_what_is_wrong_alone_is_counted_apart_and_named():
    judge = Judge([question(pose(), pose(50), pose(90))])
    alone = encoded(answer(pose(), pose(80), None))
    judge.learn(0, alone, JSON)
    found = judge.verdict(0, judge.hear(0, alone, JSON))
    assert found == Verdict(detections=3, poses=2, rejected=1, wrong_alone=1)
    assert judge.wrong_alone == [
        "3 masks (question 1), detection 2: the part is 30.0 mm and 0.0 degrees off",
        "3 masks (question 1), detection 3: the part got no pose",
    ]
    assert judge.wrong_alone_share == pytest.approx(2 / 3)


def test_missing_rows_make_every_pose_wrong():
    found = verdict(question(pose(), pose(50)), answer(pose(), pose(50)), answer(pose()))
    assert (found.detections, found.wrong, found.changed) == (1, 1, 2)


def test_rows_that_are_missing_are_noticed_also_where_no_pose_is_known():
    asked = Question(name="ready", body=b"{}", content_type=JSON, truths=())
    found = verdict(asked, answer(pose(), pose(50)), answer(pose()))
    assert (found.detections, found.changed, found.lost) == (1, 2, 1)


def test_a_pose_that_is_no_number_is_wrong():
    judge = Judge([question(pose())])
    judge.learn(0, encoded(answer(pose())), JSON)
    broken = msgspec.msgpack.encode(answer(pose(float("nan"))))
    assert judge.verdict(0, judge.hear(0, broken, MSGPACK)).wrong == 1


def test_without_a_known_pose_the_answer_alone_is_the_measure():
    asked = question(None)
    assert verdict(asked, answer(pose(33)), answer(pose(33))) == Verdict(detections=1, poses=1)
    assert verdict(asked, answer(pose(33)), answer(pose(34))) == Verdict(detections=1, poses=1, changed=1)


def test_json_and_messagepack_answers_mean_the_same():
    judge = Judge([question(pose())])
    judge.learn(0, encoded(answer(pose())), JSON)
    packed = msgspec.msgpack.encode(answer(pose()))
    assert judge.verdict(0, judge.hear(0, packed, MSGPACK)) == Verdict(detections=1, poses=1)


def test_equal_rows_are_judged_once(monkeypatch):
    judge = Judge([question(pose())])
    judge.learn(0, encoded(answer(pose())), JSON)
    compared = []
    monkeypatch.setattr(judging, "errors", lambda *poses: compared.append(poses) or (0.0, 0.0))
    heard = [judge.hear(0, encoded(answer(pose(1), warnings=[str(turn)])), JSON) for turn in range(100)]
    assert [judge.verdict(0, one).wrong for one in heard] == [0] * 100
    assert len(compared) == 2  # with the truth, and with the answer alone


def test_answers_that_all_differ_are_not_all_kept():
    judge = Judge([question(pose())])
    judge.learn(0, encoded(answer(pose())), JSON)
    heard = [judge.hear(0, encoded(answer(pose(turn / 1000))), JSON) for turn in range(2500)]
    assert len(judge._kept) < 2001
    assert sum(judge.verdict(0, one).changed for one in heard) == 2489  # all but those within 0.01 mm


def test_stages_are_taken_from_the_answer_and_the_rest_is_the_gateway():
    judge = Judge([question(pose())])
    heard = judge.hear(0, encoded(answer(pose())), JSON)
    assert heard.stage_ms == {"queue": 2.0, "decode": 1.0, "pose": 3.0, "respond": 0.5, "gateway": 3.5}
    assert (heard.batch_detections, heard.batch_requests) == (4, 2)
    short = {"decode_ms": 5.0, "queue_ms": 2.0, "pose_ms": 3.0, "total_ms": 9.0}
    assert judge.hear(0, encoded(answer(pose(), timing=short)), JSON).stage_ms["gateway"] == 0.0
    assert judge.hear(0, encoded({"poses": []}), JSON).stage_ms == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"poses": 3}',
        b'{"poses": [{"status": "ok", "rotation": [[1]], "translation": [1, 2, 3]}]}',
    ],
)
def test_an_answer_that_is_none_is_said_to_be(body):
    with pytest.raises(UnreadableAnswer):
        Judge([question(pose())]).learn(0, body, JSON)
    with pytest.raises(UnreadableAnswer):
        Judge([question(pose())]).hear(0, body, JSON)


def test_an_answer_alone_must_have_a_row_for_each_detection():
    with pytest.raises(UnreadableAnswer, match="2 detections were sent, 1 answers came"):
        Judge([question(pose(), pose(50))]).learn(0, encoded(answer(pose())), JSON)


def test_errors_are_known_by_their_codes():
    failed = {"success": False, "error": {"code": "over_capacity", "detail": "later"}}
    assert error_code(encoded(failed), JSON) == "over_capacity"
    assert error_code(msgspec.msgpack.encode(failed), MSGPACK) == "over_capacity"
    assert error_code(b"<html>502</html>", "text/html") == "unknown"


def test_a_refusal_is_told_in_words_whatever_its_format():
    refused = {
        "error": {"code": "invalid_request", "detail": "engine must be geometric, sam6d or auto", "field": "engine"}
    }
    told = "invalid_request: engine must be geometric, sam6d or auto (field engine)"
    assert refusal_in_words(encoded(refused), JSON) == told
    assert refusal_in_words(msgspec.msgpack.encode(refused), MSGPACK) == told
    assert refusal_in_words(encoded({"error": {"code": "internal"}}), JSON) == "internal"


@pytest.mark.parametrize(
    "body, told",
    [(b"<h1>Bad\ngateway</h1>", "<h1>Bad gateway</h1>"), (b"\x81\xff\x00\xa3", "the answer says no more")],
)
def test_a_refusal_of_another_server_is_told_as_text_without_what_no_terminal_shows(body, told):
    assert refusal_in_words(body, "text/html") == f"unknown: {told}"
