"""The pose estimation network on a GPU: poses a second, how much of the card they use, and whether they are right.

    python -m benchmarks.network.gpu [--device cuda:0] [--batches 1,8,32,128] [--precisions float32,tf32,bf16]
                                     [--compile] [--profile] [--weights FILE] [--json FILE] [--docs]
    python -m benchmarks.network.gpu --device cpu --batches 1 --quick          # the same script, tried without a GPU

One run measures everything on the same instances: those of `../shared/sam6d/golden.npz` beside the project's root and
synthetic ones in turn, with generated weights unless a checkpoint is given.

- the published arithmetic (the setting `exact`), eager and float32;
- the engine's network for GPUs in each precision, eager, in passes of one size as graphs (as the engine runs it) and in
  buckets of many sizes; `--compile` adds what torch.compile makes of it, which takes a compiler and minutes;
- the card's own bf16 rate in a large product, and the arithmetic of an instance, counted;
- the time of each stage as a graph of its own, the latency of a single instance, the memory;
- the kernels of pointnet2_ext against their torch reference;
- benchmarks.network.parity on the device: exact and float32 are judged, of tf32 and bf16 the pose cases alone, since
  the original's tolerances are float32's; and the same instances alone and in company.

Exit code 1 if a judged check fails. `--docs` puts the output into docs/PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pointnet2_ext
from benchmarks.kernels import points as point_kernels
from benchmarks.network import generated_weights, parity
from benchmarks.network import run as network
from benchmarks.network.run import GOLDEN, METHODS, Pass, Seen, apart
from pem.bench.report import Table, write_json
from posekit.sam6d.checkpoint.weights import load_state_dict
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.whole import Description, Model, Network, Poses, Scene, together
from posekit.sam6d.quick.gpu import BUCKETS, PASS, PRECISIONS, GpuNetwork, Runner, captured, keep_float32

Run = Callable[[Scene, Sequence[Model]], Poses]  # poses of instances, each with its object's model

PAGE = Path(__file__).parents[2] / "docs" / "PERFORMANCE.md"
QUICK = Config(coarse_points=48, fine_points=256, model_points=256)
EXACT_AT_ONCE = 16  # instances; more of its intermediate tensors take more memory than a card has
COMPANY = 8  # instances, alone and together
ANSWERS = 200  # that the latency is taken of
DEGREES, MM = 0.01, 0.01  # by which company may move a pose
TOP = 4  # stages that the last paragraph names
SCENE, OBJECT = "geometry embedding, scene", "geometry embedding, object"


# ----------------------------------------------------------------------------------------------------------- arithmetic


class Work(NamedTuple):
    """Multiply-adds of a stage, in thousand millions per instance."""

    original: float  # in the original
    kept: float  # without what can be stored with the object
    ours: float  # in the engine's network


def arithmetic(config: Config, tabled: bool = True) -> dict[str, Work]:
    """Count the arithmetic of every stage's layers. `tabled`: the structure of pairs from a table, as in bf16."""
    c, heads, square = config.channels, config.heads, config.channels**2
    n, patch = config.patches**2, 3 * config.patch_px**2
    width, tokens = config.width, config.patches**2 + 1
    s, d, m = config.coarse_points + 1, config.fine_points, config.model_points
    samples = sum(config.position_samples)

    block = (4 + 2 * config.mlp_ratio) * tokens * width**2 + 2 * tokens**2 * width
    upscaling = n * len(config.taken_blocks) * width * config.upscaling**2 * c
    image = config.depth * block + n * patch * width + upscaling
    embedding = (1 + config.neighbours) * s * s * square
    edges = 2 * (1 + config.neighbours) * s * square

    layer = 8 * s * square + 2 * s * s * c  # of attention between the sparse points
    pairs, folded = s * s * square + s * s * c, s * square + heads * s * s * c
    dense = 6 * d * square + 2 * s * square + (s + d) * square // heads + d * c
    sparse = 2 * config.blocks  # self-attentions of a matcher; it has as many cross-attentions
    coarse_ends = s * (2 * square + s * c)  # the last projections and the product of both sides
    fine_ends = (d + 1) * (2 * square + (d + 1) * c)
    matching = {
        "original": sparse * (2 * layer + pairs),
        "kept": (2 * sparse - 1) * layer + config.blocks * pairs,
        "ours": (2 * sparse - 1) * layer + (sparse - 1) * folded,
    }
    rest = 32 * 64 + 64 * 128  # second and third layer of a shared MLP
    around = d * samples * (6 * 32 + rest) + d * square
    by_point = d * 2 * 2 * 3 * 32 + d * samples * rest + d * square
    voting = config.kept * config.coarse_points * m
    counted = {
        "image features": (image, image, image),
        SCENE: (embedding, embedding, edges if tabled else embedding),
        OBJECT: (embedding, 0, 0),
        "coarse matching": tuple(
            matching[how] + coarse_ends + sides * config.coarse_points * square
            for how, sides in (("original", 2), ("kept", 1), ("ours", 1))
        ),
        "coarse pose": (3 * voting, 3 * voting, 4 * voting),
        "position encoding, scene": (around, around, by_point),
        "position encoding, object": (around, 0, 0),
        "fine matching": tuple(
            matching[how] + sparse * dense + fine_ends + sides * d * square
            for how, sides in (("original", 2), ("kept", 1), ("ours", 1))
        ),
        "fine pose": (3 * d * (d + m), 3 * d * (d + m), d * (3 * d + 4 * m)),
    }
    return {stage: Work(*(count / 1e9 for count in counts)) for stage, counts in counted.items()}


def total(work: dict[str, Work]) -> Work:
    """Return the sum of all stages."""
    return Work(*(sum(column) for column in zip(*work.values(), strict=True)))


def work_table(work: dict[str, Work]) -> Table:
    """Make a row for each stage, and their sum."""
    table = Table(["stage", "original GMAC", "without what is kept", "ours, bf16"])
    for stage, counts in (work | {"all": total(work)}).items():
        table.add(stage, *counts)
    return table


# ------------------------------------------------------------------------------------------------------------ the clock


class Clock:
    """Times calls on a device, and measures their memory."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def runs(self, call: Callable[[], object], repeats: int) -> list[float]:
        """Return the seconds of each of some calls, as the host waits for them."""
        found = []
        for _ in range(repeats):
            self._wait()
            begun = time.perf_counter()
            call()
            self._wait()
            found.append(time.perf_counter() - begun)
        return found

    def alone(self, call: Callable[[], object], repeats: int) -> float:
        """Return the device's seconds for a call without delays of the host: as a graph, between two events."""
        if not self.cuda:
            return statistics.median(self.runs(call, repeats))
        replay, _ = captured(call)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        replay()
        begin.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / repeats

    def memory_gb(self, call: Callable[[], object]) -> float | None:
        """Return the peak memory of a call beyond what is already allocated; None if nothing counts it."""
        if not self.cuda:
            call()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def peak_flops(device: str, clock: Clock, side: int) -> float:
    """Return operations a second in a product of bf16 numbers, side x side."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / clock.alone(partial(torch.mm, a, b), 10)


# ---------------------------------------------------------------------------------------------------------- what is run


class Bench:
    """The networks on the device, and instances for them, each with an object of its own, in turn."""

    def __init__(self, weights: dict[str, Tensor], config: Config, device: str, with_golden: bool) -> None:
        self.device, self.config = device, config
        exact = Network(config)
        exact.load_state_dict(weights)
        with torch.inference_mode():
            found = [network.synthetic_instances(exact)]
            if with_golden:
                found.append(network.golden_instances(exact))
        columns = zip(*found, strict=True)
        self.seen = _cut(Seen(*(torch.cat(column).to(device) for column in columns)), config)
        self.exact = exact.to(device)
        each = zip(self.seen.object_points, self.seen.object_features, self.seen.surface, strict=True)
        with torch.inference_mode():
            self._described = [self.exact.describe(*(of[None] for of in one)) for one in each]

    def network(self, precision: str) -> GpuNetwork:
        """Build the engine's network for GPUs."""
        return GpuNetwork.of(self.exact, precision)

    def instances(self, made: Network, batch: int) -> tuple[Scene, list[Model]]:
        """Return instances with random draws of their own, and their objects' models."""
        which, uniforms = Pass.of(batch, len(self._described))
        drawn = uniforms[:, : 3 * self.config.proposals].to(self.device)
        rows = Scene(self.seen.rgb[which], self.seen.points[which], self.seen.choose[which], drawn)
        models = [made.model(Description(*described)) for described in self._described]
        return rows, [models[index] for index in which.tolist()]

    def run_exactly(self, scene: Scene, models: Sequence[Model]) -> Poses:
        """Run the published arithmetic, some instances at a time."""
        parts = [slice(begin, begin + EXACT_AT_ONCE) for begin in range(0, len(models), EXACT_AT_ONCE)]
        found = [self.exact(Scene(*(field[part] for field in scene)), together(models[part])) for part in parts]
        return Poses(*(torch.cat(column) for column in zip(*found, strict=True)))


def _cut(seen: Seen, config: Config) -> Seen:
    """Return as many points as the network takes; of an object, those furthest from each other."""
    n = config.fine_points
    return Seen(
        rgb=seen.rgb,
        points=seen.points[:, :n],
        choose=seen.choose[:, :n],
        surface=seen.surface[:, : config.model_points],
        object_points=seen.object_points[:, :n],
        object_features=seen.object_features[:, :n],
    )


class Rate(NamedTuple):
    """The speed of one setting at one batch."""

    setting: str
    batch: int
    seconds: float  # median time of a pass
    memory_gb: float | None

    @property
    def poses_per_s(self) -> float:
        """Return instances divided by the time of a pass."""
        return self.batch / self.seconds


def rates(
    name: str, call: Callable[[int], object], batches: Sequence[int], clock: Clock, repeats: int
) -> Iterator[Rate]:
    """Measure a setting at all batches; a batch that does not fit into the memory is left out, with a message."""
    for batch in batches:
        try:
            memory_gb = clock.memory_gb(partial(call, batch))  # this call also pays one-time costs
            yield Rate(name, batch, statistics.median(clock.runs(partial(call, batch), repeats)), memory_gb)
        except torch.OutOfMemoryError:
            print(f"{name} at batch {batch}: out of memory")


def ways(made: GpuNetwork, size: int, most: int, compile_too: bool) -> Iterator[tuple[str, Run]]:
    """Yield the ways to run a network, by name. `most`: instances that it will be given."""
    yield "eager", lambda scene, models: made(scene, together(models))
    yield f"passes of {size}", Runner(made, [size])
    yield "buckets", Runner(made, [bucket for bucket in BUCKETS if bucket <= most])
    if compile_too:
        yield f"compiled, passes of {size}", Runner(torch.compile(made, dynamic=False), [size])


# ----------------------------------------------------------------------------------------------------------- its stages


class StageTime(NamedTuple):
    """The time of one stage of a pass."""

    stage: str
    seconds: float  # per pass
    share_of_peak: float  # share of the peak, by the arithmetic of the engine's network


def stage_times(
    made: GpuNetwork, scene: Scene, model: Model, clock: Clock, repeats: int, work: dict[str, Work], peak: float
) -> list[StageTime]:
    """Measure each stage of a pass by itself, on the inputs that it has there."""
    calls: dict[str, partial[Any]] = {}

    def note(method: Callable[..., Any], stage: str, *arguments: Any) -> Any:
        calls[stage] = partial(method, *arguments)
        return method(*arguments)

    for method, stage in METHODS.items():
        setattr(made, method, partial(note, getattr(made, method), stage))
    try:
        made(scene, model)
    finally:
        for method in METHODS:
            delattr(made, method)
    seconds = {stage: clock.alone(call, repeats) for stage, call in calls.items()}
    seconds["fine matching"] -= seconds["position encoding, scene"]  # which includes it
    rows = len(scene.rgb)
    return [
        StageTime(stage, taken, 2e9 * work[stage].ours * rows / taken / peak if stage in work else 0.0)
        for stage, taken in seconds.items()
    ]


def closing(stages: Sequence[StageTime], size: int, one: Rate, peak: float, work: Work) -> str:
    """Explain the gap between the rate in passes of `size` and what the card could do."""
    rate, passes = one.poses_per_s, -(-one.batch // size)
    limit, lower = peak / (2e9 * work.kept), peak / (2e9 * work.ours)
    alone = sum(stage.seconds for stage in stages)
    slowest = sorted(stages, key=lambda stage: -stage.seconds)[:TOP]
    lines = [
        f"{rate:.3g} poses a second are {rate / limit:.1%} of the {limit:.3g} that {work.kept:.3g} GMAC each allow at "
        f"{peak / 1e12:.3g} TFLOP/s, and {rate / lower:.1%} of the {lower:.3g} that our {work.ours:.3g} GMAC allow.",
        f"A pass of {size} takes {alone * 1000:.3g} ms in its stages and {one.seconds / passes * 1000:.3g} ms in all. "
        "The most of it:",
    ]
    for stage in slowest:
        kind = "products" if stage.share_of_peak > 0.1 else "memory and small kernels, not arithmetic"
        share = f"{stage.seconds / alone:.0%} of the time at {stage.share_of_peak:.1%} of the peak"
        lines.append(f"  {stage.stage}: {share} ({kind})")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- answers


class Company(NamedTuple):
    """How far other instances in the pass move an instance's pose."""

    setting: str
    degrees: float
    mm: float

    @property
    def within(self) -> bool:
        """Return True if the difference is within the engines' promise."""
        return self.degrees <= DEGREES and self.mm <= MM


def company(name: str, run: Run, scene: Scene, models: list[Model]) -> Company:
    """Compare the same instances computed together and alone."""
    rows = range(len(models))
    alone = [run(Scene(*(field[row : row + 1] for field in scene)), [models[row]]) for row in rows]
    return Company(name, *apart(run(scene, models), Poses(*(torch.cat(column) for column in zip(*alone, strict=True)))))


def parity_checks(
    bench: Bench, networks: dict[str, GpuNetwork], quick: bool
) -> dict[str, list[tuple[parity.Check, bool]]]:
    """Return setting -> its checks, and if each is judged. `quick`: a single pose case."""
    golden = parity.Golden(GOLDEN, bench.device)
    poses: Iterable[parity.Posed] = parity.pose_cases(bench.exact, golden)
    cases = list(itertools.islice(poses, 1) if quick else poses)
    found = {"exact": [(check, True) for posed in cases for check in parity.against_file(posed, golden)]}
    if not quick:
        whole = (*parity.features(bench.exact, golden), *parity.matching(bench.exact, golden))
        found["exact"] = [(check, True) for check in whole] + found["exact"]
    for precision, made in networks.items():
        of_stages: list[parity.Check] = []
        if not quick:
            of_stages = [*parity.features(made, golden), *parity.matching(made, golden)]
        pairs = zip(parity.pose_cases(made, golden), cases, strict=False)
        of_poses = [check for pair in pairs for check in parity.against_exact(*pair)]
        found[precision] = [(check, precision == "float32") for check in of_stages]
        found[precision] += [(check, True) for check in of_poses]
    return found


def parity_table(checks: dict[str, list[tuple[parity.Check, bool]]]) -> Table:
    """Make a row for each stage and a column for each setting: errors, with a mark where a judged check fails."""
    table = Table(["largest error", "tolerance", *checks])
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for setting, of_setting in checks.items():
        for check, judged in of_setting:
            mark = " FAIL" if judged and check.verdict == "FAIL" else ""
            shown = f"{check.error:.2g}{mark}"
            rows.setdefault((f"{check.stage} {check.unit}".rstrip(), check.tolerance), {})[setting] = shown
    for (stage, tolerance), shown_by in rows.items():
        table.add(stage, tolerance, *(shown_by.get(setting, "") for setting in checks))
    return table


# ------------------------------------------------------------------------------------------------------------- the run


class Output(io.TextIOBase):
    """Standard output that also keeps what is written."""

    def __init__(self, to: Any) -> None:
        self._to, self.text = to, ""

    def write(self, text: str) -> int:
        """Print and keep the text."""
        self._to.write(text)
        self._to.flush()
        self.text += text
        return len(text)


def main() -> int:
    """Parse the options, run everything, print, write."""
    options = parser().parse_args()
    options.precisions = options.precisions or (["bf16"] if options.quick else list(PRECISIONS))
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu --batches 1 --quick tries the script without one")
    if options.device != "cpu":
        torch.cuda.set_device(options.device)
    if options.docs:
        from benchmarks.accuracy.run import OPENING, paste  # imports all that the other benchmark needs

        if OPENING not in PAGE.read_text():
            sys.exit(f"{PAGE} has no place for figures: it lacks {OPENING!r}")
    weights = load_state_dict(options.weights) if options.weights else _generated()
    output = Output(sys.stderr if options.json == "-" else sys.stdout)
    keep_float32()
    with contextlib.redirect_stdout(output), torch.inference_mode():
        figures, right = run_all(options, weights)
    write_json(options.json, figures)
    if options.docs:
        paste(PAGE, f"python -m benchmarks.network.gpu {' '.join(sys.argv[1:])}".rstrip(), output.text)
    return 0 if right else 1


class Measured(NamedTuple):
    """The results of running the networks."""

    rates: list[Rate]
    latency: Table
    moved: list[Company]


def measure(
    bench: Bench, networks: dict[str, GpuNetwork], options: argparse.Namespace, size: int, repeats: int
) -> Measured:
    """Measure every network in every way at every batch, a single instance, and instances in company."""
    clock, batches = Clock(bench.device), options.batches
    found = Measured([], Table(["setting", "p50 ms", "p99 ms"]), [])
    exactly = _first(bench.run_exactly, *bench.instances(bench.exact, max(batches)))
    found.rates.extend(rates("exact, eager", exactly, batches, clock, min(repeats, 3)))
    for precision, made in networks.items():
        scene, models = bench.instances(made, max(*batches, COMPANY))
        for way, run in ways(made, size, max(batches), options.compile):
            name, first = f"{precision}, {way}", _first(run, scene, models)
            found.rates.extend(rates(name, first, batches, clock, repeats))
            answers = 2 if options.quick else ANSWERS
            found.latency.add(name, *_percentiles(clock.runs(partial(_answer, first), answers)))
            if way != "eager":
                count = 2 if options.quick else COMPANY
                some = Scene(*(field[:count] for field in scene))
                found.moved.append(company(name, run, some, models[:count]))
    return found


def run_all(options: argparse.Namespace, weights: dict[str, Tensor]) -> tuple[dict[str, Any], bool]:
    """Run all parts, printing each when ready; return the figures, and True if every judged check passed."""
    quick, device = options.quick, options.device
    repeats, size = (1, 2) if quick else (options.repeats, options.size)
    config, clock = QUICK if quick else Config(), Clock(device)
    figures: dict[str, Any] = {"device": _device(device), "torch": str(torch.__version__)}

    def show(name: str, title: str, table: Table) -> None:
        print(f"\n{title}")
        table.print()
        figures[name] = table.as_dicts()

    kernels = ", ".join(f"{op} {kernel}" for op, kernel in pointnet2_ext.kernels(device).items())
    print(f"{figures['device']}, torch {torch.__version__}; point operators: {kernels}")
    show("arithmetic", "arithmetic of an instance", work_table(arithmetic(config)))
    peak = peak_flops(device, clock, 512 if quick else 8192)
    figures["peak_tflops"] = peak / 1e12
    print(f"\na product of bf16 numbers runs at {peak / 1e12:.3g} TFLOP/s here")

    bench = Bench(weights, config, device, GOLDEN.is_file() and not quick)
    networks = {precision: bench.network(precision) for precision in options.precisions}
    measured = measure(bench, networks, options, size, repeats)
    show("rates", "poses a second", _rate_table(measured.rates, peak, config))
    show("latency", "a single instance, from its inputs on the device to the pose on the host", measured.latency)

    precision = "bf16" if "bf16" in networks else options.precisions[-1]
    scene, models = bench.instances(networks[precision], size)
    work = arithmetic(config, tabled=precision == "bf16")
    stages = stage_times(networks[precision], scene, together(models), clock, repeats, work, peak)
    show("stages", f"stages of a pass of {size} in {precision}, each as a graph of its own", _stage_table(stages, size))
    show("kernels", f"point operators: {kernels}", _kernel_table(device, quick))

    right = True
    if not GOLDEN.is_file() or options.weights:
        print(f"\nno parity: it takes {GOLDEN.name} and generated weights")
    else:
        checks = parity_checks(bench, networks, quick)
        show("parity", "largest errors beside the original's numbers", parity_table(checks))
        right = not any(judged and check.verdict == "FAIL" for of in checks.values() for check, judged in of)
    table = Table(["setting", "degrees", "mm", "verdict"])
    for one in measured.moved:
        judged = "passes of" in one.setting
        table.add(*one, "pass" if one.within else "FAIL" if judged else "beyond what is promised")
        right = right and (one.within or not judged)
    show("company", f"by how much company in the pass moves a pose (limits {DEGREES:g} degrees, {MM:g} mm)", table)
    if options.profile:
        print(f"\n{_profiled(networks[precision], scene, together(models), clock)}")
    fastest = max(
        (one for one in measured.rates if one.setting == f"{precision}, passes of {size}"),
        key=lambda one: one.poses_per_s,
    )
    print(f"\n{fastest.setting}, batch {fastest.batch}:")
    print(closing(stages, size, fastest, peak, total(work)))
    return figures, right


def _first(run: Run, scene: Scene, models: Sequence[Model]) -> Callable[[int], Poses]:
    """Run as many of the instances as one asks for."""
    return lambda batch: run(Scene(*(field[:batch] for field in scene)), models[:batch])


def _answer(first: Callable[[int], Poses]) -> list[Tensor]:
    """Return a single instance's answer, on the host."""
    return [values.cpu() for values in first(1)]


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return 1000 * statistics.median(ordered), 1000 * ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]


def _rate_table(found: list[Rate], peak: float, config: Config) -> Table:
    """Shares of the peak: by the arithmetic that is left once all is kept that can be, and by what ours does."""
    exact = {one.batch: one for one in found if one.setting.startswith("exact")}
    columns = ["setting", "batch", "poses/s", "ms a pass", "times exact", "of the peak", "of it, own count", "GB"]
    table = Table(columns)
    for one in found:
        beside = exact.get(one.batch)
        used = 2e9 * one.poses_per_s / peak
        work = total(arithmetic(config, tabled=one.setting.startswith("bf16")))
        own = "" if one.setting.startswith("exact") else f"{used * work.ours:.1%}"
        faster = one.poses_per_s / beside.poses_per_s if beside else ""
        memory = "" if one.memory_gb is None else one.memory_gb
        table.add(
            one.setting, one.batch, one.poses_per_s, 1000 * one.seconds, faster, f"{used * work.kept:.1%}", own, memory
        )
    return table


def _stage_table(stages: list[StageTime], rows: int) -> Table:
    table = Table(["stage", "ms", "us an instance", "share", "of the peak"])
    alone = sum(stage.seconds for stage in stages)
    for stage in stages:
        taken = stage.seconds
        table.add(stage.stage, 1e3 * taken, 1e6 * taken / rows, f"{taken / alone:.0%}", f"{stage.share_of_peak:.1%}")
    return table


def _kernel_table(device: str, quick: bool) -> Table:
    """Make the table of benchmarks.kernels.points; with `quick`, of its first case."""
    table = Table(["op", "sizes", "reference ms", "kernel ms", "reference / kernel"])
    threads = torch.get_num_threads()
    for case in itertools.islice(point_kernels.cases(device), 1 if quick else None):
        slow, fast = (point_kernels.median_ms(call, threads) for call in (case.reference, case.kernel))
        same = torch.equal(case.kernel(), case.reference())
        table.add(case.op, case.sizes, slow, fast, f"{slow / fast:.1f}{'' if same else ', answers differ'}")
    return table


def _profiled(made: GpuNetwork, scene: Scene, model: Model, clock: Clock) -> str:
    """Profile an eager pass: the kernels that take its time."""
    activity = torch.profiler.ProfilerActivity
    made(scene, model)
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if clock.cuda else [])]) as profile:
        made(scene, model)
    by = "self_cuda_time_total" if clock.cuda else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70))


def _generated() -> dict[str, Tensor]:
    if not generated_weights.available():
        sys.exit(f"there is no {generated_weights.SHARED} to generate weights from; give --weights FILE")
    return generated_weights.state_dict()


def _device(device: str) -> str:
    return "a CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda:0", help="as torch names it (cuda:0)")
    made.add_argument(
        "--batches", type=_numbers, default=[1, 8, 32, 128], metavar="LIST", help="instances (1,8,32,128)"
    )
    made.add_argument("--precisions", type=_precisions, metavar="LIST", help="all three; quickly bf16")
    made.add_argument("--size", type=int, default=PASS, help=f"instances of a pass that is filled up ({PASS})")
    made.add_argument("--repeats", type=int, default=20, help="passes timed of each kind (20)")
    made.add_argument("--compile", action="store_true", help="also what torch.compile makes of it (minutes)")
    made.add_argument("--profile", action="store_true", help="also the kernels that a pass spends its time in")
    made.add_argument(
        "--quick", action="store_true", help="all parts once and small: to try the script, not the device"
    )
    made.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint that was imported; then no parity")
    made.add_argument("--json", metavar="FILE", help="also write the figures here (- for standard output)")
    made.add_argument("--docs", action="store_true", help="put this command and its output into docs/PERFORMANCE.md")
    return made


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _precisions(text: str) -> list[str]:
    found = text.split(",")
    if set(found) - set(PRECISIONS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(PRECISIONS)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
