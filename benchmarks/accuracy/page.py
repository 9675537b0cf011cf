"""Write the accuracy benchmark's page: the worst answers as pictures, and the reliability diagram, in one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks.accuracy import reliability
from benchmarks.accuracy.cases import Bench, Row
from posekit.engine import Bool, Float64, UInt8
from posekit.io import images
from posekit.overlay import OverlayItem, draw_overlay
from posekit.synthetic.scenes import SceneInstance

WORST = 10
MARGIN = 0.7  # share of the true mask's box, added on every side
PICTURE_PX = 440  # pixels of the longer side
TRUE_COLOR, MASK_COLOR = (126, 232, 60), (255, 255, 255)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222831; margin: 2rem auto; max-width: 1420px; padding: 0 1rem; }
h2 { margin: 2.2rem 0 .2rem; font-size: 1.05rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; }
figcaption, .facts { color: #69727d; font-size: .9rem; }
.facts b { color: #222831; font-weight: 600; }
img { display: block; border-radius: 4px; max-width: 100%; }
"""


def write_page(folder: Path, bench: Bench, rows: Sequence[Row], title: str) -> Path:
    """Write `index.html` and `reliability.png` into a folder, which is created if missing; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    diagram = images.encode_png(reliability.draw(rows), compression=9)
    (folder / "reliability.png").write_bytes(diagram)
    failures = worst(rows)
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(summary(rows))}</p>",
        f'<img src="{_inline(diagram, "png")}" width="700" alt="Reliability diagram">',
        f"<h1>The {len(failures)} worst answers</h1>" if failures else "<h1>No answer is wrong</h1>",
        *(_failure(bench, row) for row in failures),
        "</html>",
    ]
    path = folder / "index.html"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def worst(rows: Sequence[Row], count: int = WORST) -> list[Row]:
    """Return the wrong answers with the lowest AR (of equals the most confident first), one per instance."""
    wrong = sorted((row for row in rows if not row.right), key=lambda row: (row.ar, -row.confidence))
    found: dict[tuple[int, int], Row] = {}
    for row in wrong:
        found.setdefault((row.scene, row.index), row)
    return list(found.values())[:count]


def summary(rows: Sequence[Row]) -> str:
    """Say how many answers there are, and how many are wrong."""
    wrong = sum(not row.right for row in rows)
    qualities = ", ".join(dict.fromkeys(row.quality for row in rows))
    return f"{len(rows)} questions ({qualities} masks), {wrong} without a right answer."


def _failure(bench: Bench, row: Row) -> str:
    """Show one failure: the mask, the truth and the estimate side by side, and the facts about it."""
    scene = bench.accuracy_set.scenes[row.scene]
    truth = scene.instances[row.index]
    mask = bench.accuracy_set.masks[row.quality][row.scene][row.index]
    view = _View(scene.rgb, scene.K, truth.mask)
    estimate = _item(truth, np.array(row.T_cam_obj)) if row.T_cam_obj is not None else None
    pictures = [
        (f"the {row.quality} mask", view.outlined(mask)),
        ("truth", view.drawn(_item(truth, truth.T_cam_obj))),
        (f"estimate, confidence {row.confidence:.2f}" if estimate else f"no pose: {row.status}", view.drawn(estimate)),
    ]
    figures = "".join(_figure(picture, said) for said, picture in pictures)
    heading = f"{row.object}, {row.quality} mask, {row.visibility:.0%} visible (scene {row.scene}, #{row.index})"
    facts = " · ".join(f"{html.escape(name)} <b>{html.escape(value)}</b>" for name, value in _facts(row))
    return f'<h2>{html.escape(heading)}</h2><p class="facts">{facts}</p><div class="pictures">{figures}</div>'


def _figure(picture: UInt8, said: str) -> str:
    image = f'<img src="{_inline(_jpeg(picture), "jpeg")}" alt="">'
    return f"<figure>{image}<figcaption>{html.escape(said)}</figcaption></figure>"


def _facts(row: Row) -> list[tuple[str, str]]:
    if row.status != "ok":
        return [("rejected", row.status), ("because", row.detail)]
    found = [
        ("AR", f"{row.ar:.2f}"),
        ("MSSD", f"{row.mssd_mm:.1f} mm"),
        ("shift", f"{row.shift_mm:.1f} mm"),
        ("turn", f"{row.angle_deg:.1f}°"),
        ("ambiguous", "yes" if row.ambiguous else "no"),
    ]
    return found + [(name.replace("_", " "), f"{value:.3g}") for name, value in row.evidence.items()]


def _item(truth: SceneInstance, T_cam_obj: Float64) -> OverlayItem:
    return OverlayItem(label="", mesh=truth.shape.mesh, T_cam_obj=T_cam_obj)


class _View:
    """The part of a picture around a mask, enlarged."""

    def __init__(self, rgb: UInt8, K: Float64, mask: Bool) -> None:
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        pad = int(MARGIN * max(np.ptp(rows), np.ptp(columns))) + 8
        self._rows = slice(max(0, rows[0] - pad), rows[-1] + pad + 1)
        self._columns = slice(max(0, columns[0] - pad), columns[-1] + pad + 1)
        part = rgb[self._rows, self._columns]
        self._scale = PICTURE_PX / max(part.shape[:2])
        enlarged = cv2.resize(part, None, fx=self._scale, fy=self._scale, interpolation=cv2.INTER_CUBIC)
        self._rgb: UInt8 = np.asarray(enlarged, dtype=np.uint8)
        moved = np.array([[1, 0, -self._columns.start], [0, 1, -self._rows.start], [0, 0, 1]], dtype=np.float64)
        s = self._scale  # pixel centres are whole numbers: the first one moves to (s - 1) / 2
        self._K = np.array([[s, 0, (s - 1) / 2], [0, s, (s - 1) / 2], [0, 0, 1]]) @ moved @ K

    def outlined(self, mask: Bool) -> UInt8:
        """Draw a mask's outline over the picture."""
        part = mask[self._rows, self._columns].astype(np.uint8)
        size = (self._rgb.shape[1], self._rgb.shape[0])
        outlines, _ = cv2.findContours(
            cv2.resize(part, size, interpolation=cv2.INTER_NEAREST), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
        )
        picture = self._rgb.copy()
        cv2.drawContours(picture, outlines, -1, MASK_COLOR, 2, cv2.LINE_AA)
        return picture

    def drawn(self, item: OverlayItem | None) -> UInt8:
        """Draw a pose, or none, over the picture."""
        return draw_overlay(self._rgb, self._K, [item] if item else [], scale=1.0, labels=False)


def _jpeg(picture: UInt8) -> bytes:
    done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    if not done:
        raise RuntimeError("OpenCV cannot write JPEG")
    return data.tobytes()


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
