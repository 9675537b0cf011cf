"""`pem bench`: put load on a pose server, measure it, and find how many robots it carries; done by `pem.bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar, get_args

import typer

from pem.commands import common

T = TypeVar("T")
_SLO: Final = "p99=500ms"
_ROBOTS_HZ: Final = 0.5
_RATE_HELP: Final = "Requests a second that come whatever the server does (open loop), separated by commas."


def bench(
    url: Annotated[
        str | None, typer.Option("--url", help="The server to ask.", show_default="one of its own, for as long")
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(
            help="Clients that each wait for their answer (closed loop); 1,8,32 runs each.", show_default="1,8,32"
        ),
    ] = None,
    rate: Annotated[str | None, typer.Option(help=_RATE_HELP)] = None,
    duration: Annotated[
        float,
        typer.Option(
            help="Seconds that each run is measured for; with --picture up to 40 to have 100 answers.", min=0.5
        ),
    ] = 20.0,
    warmup: Annotated[float, typer.Option(help="Seconds of load before that.", min=0.0)] = 3.0,
    masks: Annotated[str, typer.Option(help="Masks of a request; of several, each equally often.")] = "3",
    sizes: Annotated[str, typer.Option(help="Sizes of the pictures, likewise.")] = "640x480",
    format: Annotated[str, typer.Option(help="Bodies of requests: msgpack, json, multipart, likewise.")] = "msgpack",
    scenes: Annotated[int, typer.Option(help="Different pictures of each size.", min=1, max=1000)] = 4,
    objects: Annotated[
        int | None, typer.Option(help="Different CAD models to choose from.", min=1, show_default="13")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the scenes, and of when requests come.", min=0)] = 0,
    engine: Annotated[str, typer.Option(help="Which engine, asked for in each request.")] = "auto",
    deadline_ms: Annotated[
        int | None, typer.Option(help="Of each request.", min=1, show_default="the server's own")
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(help="A ready request (.json or .msgpack) in place of scenes: its true poses are not known."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of its own server, as pose.threads=1; repeatable."),
    ] = None,
    capacity: Annotated[bool, typer.Option("--capacity", help="Search how many robots the server carries.")] = False,
    slo: Annotated[
        str | None, typer.Option(help="With --capacity: what each robot is promised.", show_default=_SLO)
    ] = None,
    robots_hz: Annotated[
        float | None,
        typer.Option(help="With --capacity: requests a second of each robot.", show_default=f"{_ROBOTS_HZ:g}"),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw latency against offered load, at the rates of --rate or its own."),
    ] = None,
    limit_mm: Annotated[float, typer.Option(help="A pose that is further off is wrong.", min=0.0)] = 5.0,
    limit_deg: Annotated[float, typer.Option(help="A pose that is turned further is wrong.", min=0.0)] = 5.0,
    compare_alone: Annotated[
        bool,
        typer.Option(
            "--compare-alone/--no-compare-alone",
            help="Whether rows must equal, within 0.01 mm and 0.01 degrees, those of the same question asked alone.",
        ),
    ] = True,
    most_wrong_alone: Annotated[
        float,
        typer.Option(
            help="Share of detections, 0 to 1, that may be wrong even without load, which is not the load's matter."
        ),
    ] = 0.2,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one answer.", min=0.1)] = 60.0,
    pid: Annotated[
        int | None, typer.Option(help="Of the server behind --url where it runs here: shows CPU and memory.")
    ] = None,
    api_key: common.ApiKey = None,
    json: common.Json = None,
) -> None:
    """Put load on a server and say how much it carries, how fast, and whether every answer stays right.

    Requests are rendered scenes whose poses are known; each is asked alone first. Exits 0 only where every request
    was answered (429 counts as an answer) and no pose was wrong, lost or another one than alone. With --capacity a
    request may fail where there are too many robots, and it exits 0 where at least one is served.

    Examples:

      pem bench

      pem bench --clients 1,8,32 --masks 1,3 --set pose.threads=1

      pem bench --rate 2,5,10 --duration 60 --json load.json

      pem bench --picture load.svg --duration 30

      pem bench --capacity --slo p99=500ms --robots-hz 0.5 --masks 5

      pem bench --url http://robot-cell:8003 --request request.msgpack --clients 4
    """
    if url is not None and set_:
        common.fail("--set is for the server that this starts; the one behind --url has its own settings", 2)
    if url is None and pid is not None:
        common.fail("--pid says which process is behind --url; give both", 2)
    for option, value in {"--slo": slo, "--robots-hz": robots_hz}.items():
        if value is not None and not capacity:
            common.fail(f"{option} is what --capacity searches with; give both", 2)
    common.check_folder(json, picture)
    from pem.bench import cli, here
    from pem.bench.judge import Limits
    from pem.bench.mix import Mix
    from pem.bench.sample import Format

    if here.commands() is None:
        if url is None:
            common.need_server("a server of one's own")
        if request is None:
            common.note("Scenes are drawn by what the server is made of. A request that is there already needs none of")
            common.note("it: pem bench --url http://HOST:8003 --request request.msgpack")
            common.need_server("drawing scenes")
    formats = {name: name for name in get_args(Format)}
    mix = Mix(
        masks=_list(masks, int, "--masks", "3 or 1,3,10"),
        sizes=_list(sizes, _size, "--sizes", "640x480 or 640x480,1280x720"),
        formats=_list(format, formats.__getitem__, "--format", " or ".join(formats)),
        engine=engine,
        deadline_ms=deadline_ms,
        scenes=scenes,
        objects=objects,
        seed=seed,
    )
    plan = cli.Plan(
        url=url,
        api_key=api_key,
        pid=pid,
        settings=dict(_setting(text) for text in set_ or ()),
        mix=mix,
        request=request,
        clients=_list(clients, int, "--clients", "8 or 1,8,32"),
        rates_hz=_list(rate, float, "--rate", "10 or 2,5,10"),
        seconds=duration,
        warmup_s=warmup,
        timeout_s=timeout,
        limits=Limits(mm=limit_mm, deg=limit_deg),
        compare_alone=compare_alone,
        most_wrong_alone=most_wrong_alone,
        json=json,
        picture=picture,
        slo=(_SLO if slo is None else slo) if capacity else None,
        robots_hz=_ROBOTS_HZ if robots_hz is None else robots_hz,
    )
    raise typer.Exit(cli.run(plan))


def _list(text: str | None, read: Callable[[str], T], option: str, example: str) -> tuple[T, ...]:
    """Read a comma-separated option; return () if it was not given."""
    if text is None:
        return ()
    try:
        return tuple(read(part.strip()) for part in text.split(","))
    except (ValueError, KeyError):
        common.fail(f"{option} {text}: write {example}", 2)


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(width), int(height)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        common.fail(f"--set {text}: write NAME=VALUE, as pose.threads=1", 2)
    return name.strip(), value.strip()
