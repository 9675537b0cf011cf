"""Measure how right, how sure and how fast the geometric engine is, on rendered scenes with known poses.

    python -m benchmarks.accuracy                                     # 40 scenes, three qualities of mask
    python -m benchmarks.accuracy --scenes 6 --masks exact --verbose  # a look while working on the engine
    python -m benchmarks.accuracy --wrong-objects --tracking --http --peers open3d,opencv --page build/accuracy
    python -m benchmarks.accuracy --gpu-batches --device cuda         # poses a second; are they the CPU's?

AR is the average recall of the BOP challenges, the mean of its three measures (bop.py). An answer is «right» if no
point of the object is off by a tenth of its diameter or more, modulo its symmetries (MSSD), and «sure» with a
confidence over 0.8. Seconds are those of a pass, divided by its instances, without decoding; --http measures all
stages. `make bench-accuracy` runs everything, with the peers in an environment of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.accuracy import reliability, studies, tables
from benchmarks.accuracy import service as accuracy_service
from benchmarks.accuracy.cases import Bench, Row, run_masks
from benchmarks.accuracy.page import write_page
from benchmarks.accuracy.set import QUALITIES, load
from benchmarks.peers import ask as peers
from pem.bench.report import Table, write_json
from posekit.engine import Instance
from posekit.geometric.engine import GeometricEngine
from posekit.io import images

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "real"
DOCS = ROOT / "docs" / "ACCURACY.md"
OPENING, CLOSING = "<!-- figures: written by --docs -->", "<!-- end of figures -->"
WORKER_OBJECTS = 20  # objects loaded when memory is measured
ERRORS = Console(stderr=True, highlight=False)


class Report:
    """The results of a run so far: each part is printed when it is ready, and kept for the JSON and the docs."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.text = ""
        self._after_table = False

    def table(self, name: str, table: Table) -> None:
        """Print and keep a table, after an empty line."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            table.print()
        self._say(f"\n{printed.getvalue()}")
        self._after_table = True
        self.figures[name] = table.as_dicts()

    def line(self, name: str, text: str, figure: Any) -> None:
        """Print one line, and keep the figure in it."""
        self._say(f"\n{text}\n" if self._after_table else f"{text}\n")
        self._after_table = False
        self.figures[name] = figure

    def _say(self, text: str) -> None:
        print(text, end="", flush=True)
        self.text += text


def main() -> int:
    """Parse the command line, run what it asks for, print, write."""
    options = parser().parse_args()
    accuracy_set = load(options.seed, options.scenes, options.objects)
    with ERRORS.status("onboarding") as status:
        engine = GeometricEngine(options.device, options.threads)
        names = sorted({item.shape.name for scene in accuracy_set.scenes for item in scene.instances})
        bench = Bench.prepare(accuracy_set, engine, names, lambda name: status.update(f"onboarding: {name}"))
        title = (
            f"{accuracy_set.name}, {len(names)} objects, engine {engine.name} {engine.version} on {options.device}, "
            f"{options.threads} thread{'s' if options.threads > 1 else ''}, torch {torch.__version__}, {_commit()}"
        )
        report = Report()
        report.line("title", title, title)
        (_gpu_batches if options.gpu_batches else _everything)(bench, options, report, status.update)
    write_json(options.json, report.figures)
    if options.docs:
        paste(DOCS, f"python -m benchmarks.accuracy {' '.join(sys.argv[1:])}", report.text)
    return 0


def _gpu_batches(bench: Bench, options: argparse.Namespace, report: Report, tell: studies.Tell) -> None:
    cpu = GeometricEngine("cpu", options.threads)
    report.table("batches", studies.run_batches(bench, options.masks[0], cpu, tell))


def _everything(bench: Bench, options: argparse.Namespace, report: Report, tell: studies.Tell) -> None:
    bench.ask(bench.cut(bench.cases(options.masks[0], 0)))  # costs that a process pays once
    rows = [row for quality in options.masks for row in run_masks(bench, quality, options.batch, tell)]
    _engine_alone(bench, rows, options, report, tell)
    if options.wrong_objects:
        wrong = studies.run_wrong(bench, options.masks, options.seed, tell)
        report.table("wrong_objects", studies.wrong_table(wrong))
        report.figures["wrong_rows"] = wrong
    if options.tracking:
        before, after = studies.run_tracking(bench, options.masks[0], options.seed, tell)
        report.table("tracking", studies.tracking_table(before, after))
    if options.real is not None:
        frames = studies.real_frames(options.real)
        if frames:
            report.table("real", studies.run_real(bench.engine, frames, tell))
        else:
            ERRORS.print(f"no real frames: {options.real} has no folder with a gt.json")
    if options.http:
        _service(bench, rows, options, report, tell)
    if options.peers:
        try:
            found = peers.compare(bench, rows, options.peers, options.peer_instances, options.threads, tell)
            report.table("peers", found)
        except peers.PeerFailed as error:
            ERRORS.print(f"no peers: {error}")
    if options.docs:
        (DOCS.parent / "images" / "reliability.png").write_bytes(
            images.encode_png(reliability.draw(rows), compression=9)
        )
    if options.page:
        path = write_page(options.page, bench, rows, report.figures["title"])
        ERRORS.print(f"the worst answers as pictures: {path}")


def _engine_alone(
    bench: Bench, rows: list[Row], options: argparse.Namespace, report: Report, tell: studies.Tell
) -> None:
    """Report the tables of the main run, and the engine's other costs."""
    if options.verbose:
        print()
        for row in rows:
            if not row.right:
                print(tables.failure_line(row))
    report.table("by_quality", tables.by_quality(rows))
    report.table("by_object", tables.by_object(rows, bench.onboarding_s))
    report.table("by_visibility", tables.by_visibility(rows))
    report.table("reliability", tables.reliability(rows))
    report.figures["rows"] = rows
    seconds = list(bench.onboarding_s.values())
    median, worst = tables.percentile(seconds, 50), max(seconds)
    report.line("onboarding_s", f"onboarding: {median:.2f} s at the median, {worst:.2f} s at worst", [median, worst])
    decode_ms = tables.percentile(bench.decode_ms, 50)
    report.line("decode_ms", f"decoding: {decode_ms:.1f} ms an instance, pictures shared by a scene's", decode_ms)
    tell("memory")
    models = dict(list(bench.models.items())[:WORKER_OBJECTS])
    cases = [case for case in bench.cases(options.masks[0], 0) if case.asked in models]
    instances = [ask for ask in bench.cut(cases) if isinstance(ask, Instance)]
    taken = studies.memory(models, instances, options.device, options.threads)
    text = f"{taken['objects']} objects loaded: {taken['loaded_mb']:.0f} MB, {taken['pass_mb']:.0f} MB after a pass"
    report.line("memory", f"memory of a process with {text}", taken)


def _service(bench: Bench, rows: list[Row], options: argparse.Namespace, report: Report, tell: studies.Tell) -> None:
    """Ask the same questions through a running service."""
    service = accuracy_service.run_service(bench, rows, options.masks, options.device, options.threads, tell)
    report.table("service", tables.by_quality(service.rows))
    report.table("service_stages", service.stages)
    seconds = list(service.onboarding_s.values())
    median, worst = tables.percentile(seconds, 50), max(seconds)
    report.line(
        "service_onboarding_s",
        f"onboarding through the service: {median:.2f} s at the median, {worst:.2f} s at worst",
        [median, worst],
    )
    text = f"{len(bench.models)} objects loaded: {service.worker_mb:.0f} MB"
    report.line("service_memory_mb", f"memory of the pose worker with {text}", service.worker_mb)
    report.line(
        "service_difference",
        f"largest difference to the library's poses: {service.most_deg:.4f} deg, {service.most_mm:.4f} mm",
        {"deg": service.most_deg, "mm": service.most_mm},
    )


def parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = made.add_argument_group("what is asked")
    which.add_argument("--scenes", type=int, default=40, help="scenes of 3 to 6 objects (40)")
    which.add_argument("--objects", type=int, default=24, help="objects that they are made of (24)")
    which.add_argument("--seed", type=int, default=0, help="another seed: other objects and scenes (0)")
    which.add_argument(
        "--masks",
        type=_one_of(QUALITIES),
        default=list(QUALITIES),
        metavar="LIST",
        help="qualities of mask, of exact, noisy (IoU about 0.8) and under (with neighbours' pixels); all of them",
    )
    how = made.add_argument_group("how")
    how.add_argument("--device", default="cpu", help="where the engine computes, as torch names it (cpu)")
    how.add_argument("--threads", type=int, default=2, help="CPU threads of the engine and of each peer (2)")
    how.add_argument("--batch", type=int, help="instances of a pass; left out, each scene is a pass of its own")
    more = made.add_argument_group("what else is measured")
    more.add_argument("--http", action="store_true", help="the same through a service, started and stopped for this")
    more.add_argument(
        "--wrong-objects",
        action="store_true",
        help="ask for objects that the masks do not show: how many are believed?",
    )
    more.add_argument(
        "--tracking", action="store_true", help="refine true poses that were moved by 5 mm and 5 degrees, no search"
    )
    more.add_argument(
        "--real",
        type=Path,
        nargs="?",
        const=REAL,
        metavar="FOLDER",
        help="real frames, a folder each with rgb.png, depth.png, camera.json, gt.json, mask and mesh (../shared/real)",
    )
    more.add_argument(
        "--peers",
        type=_one_of(tuple(peers.PEERS), none=True),
        default=[],
        metavar="LIST",
        help="other solvers on the same points, of open3d and opencv (none); `make peers` installs them",
    )
    more.add_argument(
        "--peer-instances", type=int, default=20, help="masks of each quality that the peers are asked (20)"
    )
    more.add_argument(
        "--gpu-batches",
        action="store_true",
        help="only this: poses a second on --device with batches of 1, 8 and 64, and whether they are the CPU's",
    )
    out = made.add_argument_group("what is written")
    out.add_argument("--verbose", action="store_true", help="one line for each wrong answer")
    out.add_argument("--json", metavar="FILE", help="all figures and rows (- for standard output)")
    out.add_argument("--page", type=Path, metavar="DIR", help="index.html with the worst answers, reliability.png")
    out.add_argument(
        "--docs", action="store_true", help="put this command and its figures into docs/ACCURACY.md, with its picture"
    )
    return made


def _one_of(known: tuple[str, ...], none: bool = False) -> Any:
    """Return a converter for a comma-separated list of known words; with `none`, "none" is the empty list."""

    def words(text: str) -> list[str]:
        found = [] if none and text == "none" else text.split(",")
        wrong = [word for word in found if word not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)!r}: choose from {', '.join(known)}")
        return found

    return words


def paste(page: Path, command: str, text: str) -> None:
    """Put a command and its output between the marks of a page; ValueError if the page has none."""
    before, opening, rest = page.read_text().partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not opening or not closing:
        raise ValueError(f"{page} has no place for figures: it lacks {OPENING!r} or {CLOSING!r}")
    block = f"\n\n```sh\n.venv/bin/{command}\n```\n\n```text\n{text.rstrip()}\n```\n\n"
    page.write_text(before + opening + block + closing + after)


def _commit() -> str:
    """Return the measured commit, with a + if files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no commit"


if __name__ == "__main__":
    sys.exit(main())
