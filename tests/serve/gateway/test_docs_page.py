"""The page `/docs`: it shows every route, lets one try it, and asks no other host. In Chromium, where that is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from posekit.io import images
from serve.gateway import openapi
from tests.running import Question, RunningServer
from tests.serve.gateway.browser import Browser, chromium
from tests.serve.tiny import Asker


def test_the_page_asks_no_other_host() -> None:
    page = openapi.page().decode()
    assert page.startswith("<!doctype html>")
    assert "./openapi.json" in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)
    assert "default-src 'none'" in page
    assert re.findall(r"https?://[^\s\"'`)]+", page) == []


def test_the_page_is_not_shown_inside_another(ask: Asker) -> None:
    assert ask.send("GET", "/docs").headers["Content-Security-Policy"] == "frame-ancestors 'none'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: the package chromium)")
    with Browser(program, tmp_path_factory.mktemp("browser")) as one:
        yield one


class Trial:
    """The form of one route on the page."""

    def __init__(self, browser: Browser, server: RunningServer, route: str) -> None:
        self.browser = browser
        self.at = f"#{route} .trial"
        browser.open(f"{server.url}/docs#{route}")
        browser.wait_for(f"document.querySelector('{self.at}') !== null")
        browser.evaluate(f"document.querySelector('{self.at}').open = true")

    def fill(self, selector: str, text: str) -> None:
        self.browser.evaluate(f"document.querySelector('{selector}').value = {json.dumps(text)}")

    def choose(self, name: str, *files: Path) -> None:
        self.browser.choose(f"{self.at} [name={name}][type=file]", files)

    @property
    def request(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(self.browser.evaluate(f"document.querySelector('{self.at} textarea').value"))
        return tree

    def send(self) -> str:
        """Send the form; return the answer that the page shows."""
        self.browser.evaluate(f"document.querySelector('{self.at} .answer').replaceChildren()")
        self.browser.evaluate(f"document.querySelector('{self.at} .send').click()")
        self.browser.wait_for(f"document.querySelector('{self.at} .answer .status') !== null")
        return str(self.browser.evaluate(f"document.querySelector('{self.at} .answer').innerText"))


def test_the_page_shows_every_route(browser: Browser, server: RunningServer, ask: Asker) -> None:
    browser.open(f"{server.url}/docs#post_v1_pose_estimation")
    browser.wait_for("document.querySelector('.trial') !== null")
    dom = browser.evaluate("document.getElementById('main').outerHTML")
    for path, methods in ask.send("GET", "/openapi.json").json()["paths"].items():
        for operation in methods.values():
            assert path in dom
            assert f'id="{operation["operationId"]}"' in dom
    assert "over_capacity" in dom
    assert "Loading" not in dom
    assert "header: integer" in dom  # the route named in the address is open
    loaded = browser.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert set(loaded) == {f"{server.url}/openapi.json"}


def test_a_route_is_tried_with_its_parameters(browser: Browser, server: RunningServer) -> None:
    trial = Trial(browser, server, "get_v1_objects_one")
    trial.fill(f"{trial.at} [name=id]", "hous/ing")
    shown = trial.send()
    assert "404 Not Found" in shown
    assert '"unknown_object"' in shown
    trial.fill(f"{trial.at} [name=id]", "housing")
    shown = trial.send()
    assert "200 OK" in shown
    assert '"name": "housing"' in shown


def test_poses_are_asked_for_with_files_and_the_overlay_is_shown(
    browser: Browser, server: RunningServer, question: Question, tmp_path: Path
) -> None:
    trial = Trial(browser, server, "post_v1_pose_estimation")
    assert trial.request["object_id"] == "mug"  # the first example, without what comes as files
    assert not {"rgb_image", "depth_image"} & trial.request.keys()
    body = question.body(indices=[0], rgb_image=..., depth_image=..., visualize=True)
    files = {"rgb": question.rgb, "depth": question.depth, "request": msgspec.json.encode(body)}
    for name, data in files.items():
        path = tmp_path / f"{name}.{'json' if name == 'request' else 'png'}"
        path.write_bytes(data)
        trial.choose(name, path)
    browser.wait_for(f"document.querySelector('{trial.at} textarea').value.includes('housing')")
    trial.fill(f"{trial.at} [name=X-Request-Id]", "from-the-page")
    shown = trial.send()
    assert "200 OK" in shown
    assert "X-Request-Id: from-the-page" in shown
    assert '"success": true' in shown
    assert '"status": "ok"' in shown
    picture = f"document.querySelector('{trial.at} .answer img')"
    width = browser.wait_for(f"{picture}.naturalWidth")  # decoded: the policy of the page lets it be shown
    assert width == question.scene.rgb.shape[1]
    for width in (400, 1400):
        browser.resize(width, 900)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    (line,) = server.logged("from-the-page")
    assert "/api/v1/pose_estimation" in line


def test_files_of_masks_and_cad_go_into_the_request(
    browser: Browser, server: RunningServer, question: Question, tmp_path: Path
) -> None:
    trial = Trial(browser, server, "post_v1_pose_estimation")
    mask, cad = tmp_path / "mask.png", tmp_path / "housing.PLY"
    mask.write_bytes(images.encode_png(question.scene.instances[0].mask))
    cad.write_bytes(b"ply")
    trial.choose("masks", mask)
    trial.choose("cad", cad)
    browser.wait_for(f"document.querySelector('{trial.at} textarea').value.includes('data:image/png')")
    assert list(trial.request["detections"]) == ["masks"]
    assert "object_id" not in trial.request
    assert trial.request["cad_format"] == "ply"


def test_an_object_is_called_as_its_file_and_its_unit_is_left_to_the_server(
    browser: Browser, server: RunningServer, tmp_path: Path
) -> None:
    trial = Trial(browser, server, "post_v1_objects")
    part = tmp_path / "my part.v2.ply"
    part.write_bytes(b"ply")
    trial.choose("file", part)
    browser.wait_for(f"document.querySelector('{trial.at} textarea').value.includes('my part')")
    assert trial.request == {"name": "my part.v2"}


def test_json_is_sent_as_it_was_typed_and_the_key_is_kept_in_memory_alone(
    browser: Browser, server: RunningServer
) -> None:
    trial = Trial(browser, server, "post_v1_pose_estimation")
    browser.evaluate(
        f"""
        window.sent = [];
        window.sending = fetch;
        window.fetch = (...all) => {{ sent.push(all); return sending(...all); }};
        const key = document.querySelector(".key input");
        key.value = "pem_secret";
        key.dispatchEvent(new Event("input"));
        [...document.querySelectorAll("{trial.at} .tabs button")].find(one => one.innerText === "JSON").click();
        """
    )
    trial.fill(f"{trial.at} textarea", "{oh")
    shown = trial.send()
    assert "400 Bad Request" in shown
    assert '"bad_body"' in shown
    ((address, options),) = browser.evaluate("sent")
    assert address == "./api/v1/pose_estimation"
    assert (options["method"], options["body"]) == ("POST", "{oh")
    assert options["headers"] == {"X-API-Key": "pem_secret", "Content-Type": "application/json"}
    assert browser.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert "pem_secret" not in browser.evaluate("document.documentElement.outerHTML")
