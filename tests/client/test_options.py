"""Options: by keyword, as a struct, or both; and how help() and a notebook's completion show them."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import pydoc
from typing import Any

import numpy as np
import pytest

from pem import client
from pem.client import AsyncClient, AsyncObjects, Client, Objects
from pem.options import ClientOptions, DetectionOptions, ObjectOptions, PoseOptions, merged

K = np.array([[600.0, 0, 31.5], [0, 600.0, 23.5], [0, 0, 1]])
RGB = np.full((48, 64, 3), 100, np.uint8)
DEPTH = np.full((48, 64), 800, np.uint16)
MASK = np.ones((48, 64), bool)
TAKING = [
    (Client.__init__, ClientOptions),
    (AsyncClient.__init__, ClientOptions),
    (Client.estimate, DetectionOptions),
    (AsyncClient.estimate, DetectionOptions),
    (Client.full_pipeline, PoseOptions),
    (AsyncClient.full_pipeline, PoseOptions),
    (Objects.add, ObjectOptions),
    (AsyncObjects.add, ObjectOptions),
]


@pytest.mark.parametrize("verb, kind", TAKING, ids=lambda value: getattr(value, "__qualname__", None))
def test_a_verb_shows_each_option_with_its_type_default_and_words(verb: Any, kind: type[Any]) -> None:
    shown = inspect.signature(verb).parameters
    text = pydoc.plain(pydoc.render_doc(verb))
    assert "more" not in shown
    for option in dataclasses.fields(kind):
        assert shown[option.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[option.name].default is option.default
        assert shown[option.name].annotation == option.type
        assert f"{option.name}: {option.type} = {option.default!r}\n" in text
        assert option.metadata["words"] in text


def test_completion_of_a_client_knows_the_options_too() -> None:
    assert {"url", "api_key", "options", "timeout_s", "use_json"} <= set(inspect.signature(Client).parameters)
    with Client("http://127.0.0.1:9") as pem:
        assert "hypotheses" in inspect.signature(pem.estimate).parameters
        assert "self" not in inspect.signature(pem.objects.add).parameters
    assert "refine: Literal['auto', 'icp', 'none'] | None = None" in pydoc.plain(pydoc.render_doc(DetectionOptions))


def test_one_line_says_what_an_option_is() -> None:
    for kind in (ClientOptions, DetectionOptions, ObjectOptions):
        for option in dataclasses.fields(kind):
            words = option.metadata["words"]
            assert 0 < len(words) <= 120, option.name
            assert "\n" not in words, option.name


def test_keywords_win_over_the_struct() -> None:
    options = DetectionOptions(object_id="mug", refine="icp", seed=3)
    chosen = merged("estimate", DetectionOptions, options, {"seed": 4, "refine": None, "visualize": True})
    assert chosen == {"object_id": "mug", "refine": None, "seed": 4, "visualize": True}


def test_a_struct_says_only_what_it_was_told() -> None:
    assert repr(DetectionOptions(object_id="mug", seed=3)) == "DetectionOptions(object_id='mug', seed=3)"
    assert repr(ObjectOptions()) == "ObjectOptions()"
    assert ObjectOptions(wait=False).said() == {"wait": False}


def test_options_of_another_verb_are_named() -> None:
    with Client("http://127.0.0.1:9") as pem:
        with pytest.raises(TypeError, match=r"full_pipeline\(\) has no option 'boxes'"):
            pem.full_pipeline(RGB, DEPTH, K, template_dir="t", options=DetectionOptions(boxes=[]))
        with pytest.raises(TypeError, match=r"takes options as pem\.DetectionOptions, not as dict; .* \*\*options"):
            pem.estimate(RGB, DEPTH, K, [MASK], options={"object_id": "x"})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"estimate\(\) has no option 'wait'"):
            pem.estimate(RGB, DEPTH, K, [MASK], options=ObjectOptions(wait=False))  # type: ignore[arg-type]


def test_an_unknown_option_is_named_with_the_nearest_known_one() -> None:
    frame = (RGB, DEPTH, K)
    with client.Client("http://127.0.0.1:9", retries=0) as pem:
        with pytest.raises(TypeError, match=r"estimate\(\) has no option 'hypothesis'; did you mean 'hypotheses'\?"):
            pem.estimate(*frame, [MASK], hypothesis=3)
        with pytest.raises(TypeError, match="'min_scores'; did you mean 'min_score'"):
            pem.estimate(*frame, [MASK], min_scores=0.9)
        with pytest.raises(TypeError, match="'mask'; did you mean 'masks'"):
            pem.estimate(*frame, mask=[MASK])
        with pytest.raises(TypeError, match="'xyz'; it takes rgb, depth"):
            pem.full_pipeline(*frame, template_dir="t", xyz=1)
        with pytest.raises(TypeError, match="'unit'; did you mean 'model_unit'"):
            pem.objects.add("mug.ply", unit="m")
    with pytest.raises(TypeError, match="'timeout'; did you mean 'timeout_s'"):
        client.Client(timeout=3)

    async def ask() -> None:
        async with client.AsyncClient("http://127.0.0.1:9") as pem:
            with pytest.raises(TypeError, match="'min_scores'; did you mean 'min_score'"):
                await pem.estimate(*frame, [MASK], min_scores=0.9)
            with pytest.raises(TypeError, match="'nam'; did you mean 'name'"):
                await pem.objects.add("mug.ply", nam="mug")

    asyncio.run(ask())
