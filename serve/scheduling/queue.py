"""The queue in front of the pose stage: admission, turns, deadlines, retries.

Mosec gathers batches but knows neither clients nor deadlines, and a worker takes nothing new until its whole batch is
back. So only a few passes' worth of detections are inside Mosec at any time, and everything else waits here:

- Clients take turns: the one that was served least goes next. Within a client the request with the least left to do
  goes first, except that one that has waited for half its deadline gets every second turn.
- A request larger than a pass is split into parts, whose rows are put together again. On a CPU, where a worker looks
  at one detection after the other, a request that finds several workers idle is split between them.
- While there is a worker without work, everything is sent at once. While all are busy, what comes is gathered until it
  fills a pass, `pose.batch_wait_ms` at the longest: `on_dispatch` hears which it was ("idle", "full" or "window").
- A request that could not be answered in time is refused at the door (429 with Retry-After, or 422 where even an idle
  server could not). What has passed its deadline, or whose client has gone, is dropped before it starts.
- A part whose worker died is sent again, alone this time, so that it cannot take others down twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import structlog

from pem.contract import Row
from serve.backend.mosec import Backend, BackendError, Interrupted
from serve.backend.run_dir import RunDir
from serve.errors import ApiError, from_failure, internal_error, worker_lost
from serve.scheduling.receipt import Receipt, receipt
from serve.settings import Queue as QueueSettings
from workers.messages import Answer, Failure, FinishPart, Job, Part, PartAnswer, PassRecord
from workers.settings import on_gpu

log = structlog.get_logger()

_decode_answer = msgspec.msgpack.Decoder(Answer).decode
_encode = msgspec.msgpack.encode

#: Before anything was measured: cautious for the ceiling, generous for `deadline_too_short`.
_UNMEASURED_RATE = 5.0
_PROMISED = 0.8  # share of a deadline that may be full of others' work: what is let in is to be answered, not late
_LEAST_S = 0.01  # no answer is faster, whatever is measured
_FORGET = 0.9  # share of the past that each pass leaves in the measured rate
_SURE = 2.0  # how far off the measured rate may be before a deadline is called impossible
_SURE_AFTER = 3  # passes that must have been measured, and
_SURE_FOR_S = 60.0  # how lately: a rate that lets nothing in would never be measured again
_LONGEST_BACKEND_OUTAGE_S = 60.0
_PAUSE_BEFORE_RETRY_S = 0.05
_SLACK_S = 30.0


@dataclass
class Solution:
    """All rows of one request, in order, with what they cost."""

    rows: list[Row]
    engine: str  # another than was asked for where that answered any of the parts
    warnings: list[str]
    receipt: Receipt
    batch_detections: int
    batch_requests: int
    visualization: bytes | None = None
    output_written: bool = False


@dataclass(eq=False)
class _Part:
    ticket: _Ticket
    part: Part
    attempts: int = 0
    waited_s: float = 0.0

    @property
    def cost(self) -> int:
        return max(1, self.part.stop - self.part.start)

    @property
    def engine(self) -> str:
        return self.ticket.job.engine


@dataclass(eq=False)
class _Ticket:
    job: Job
    client: str
    arrived: float
    deadline: float  # monotonic
    path: str | None
    encoded: bytes
    pending: list[_Part]
    done: asyncio.Future[None]
    answers: dict[int, PartAnswer] = field(default_factory=dict)
    running: int = 0
    closed: bool = False

    @property
    def remaining(self) -> int:
        return sum(part.cost for part in self.pending)


class _Rate:
    """Detections per second of one engine on one device, as the passes report it; recent ones count more."""

    def __init__(self) -> None:
        self._detections = 0.0
        self._seconds = 0.0
        self._passes = 0
        self._latest = 0.0

    def seed(self, detections_per_second: float) -> None:
        if self._seconds == 0 and detections_per_second > 0:
            self._detections, self._seconds = detections_per_second, 1.0

    def add(self, record: PassRecord) -> None:
        self._detections = self._detections * _FORGET + record.detections
        self._seconds = self._seconds * _FORGET + record.seconds
        self._passes += 1
        self._latest = time.monotonic()

    @property
    def value(self) -> float:
        return self._detections / self._seconds if self._seconds > 1e-6 else _UNMEASURED_RATE

    @property
    def is_sure(self) -> bool:
        return self._passes >= _SURE_AFTER and time.monotonic() - self._latest < _SURE_FOR_S


class PoseQueue:
    """Everything that waits for the pose stage of one backend."""

    def __init__(
        self,
        backend: Backend,
        run_dir: RunDir,
        settings: QueueSettings,
        *,
        pass_detections: int,
        on_part: Callable[[PartAnswer, float], None],
        on_dispatch: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._backend = backend
        self._run_dir = run_dir
        self._settings = settings
        self._pass = pass_detections
        self._gather_s = backend.stages.pose.batch_wait_ms / 1000
        self._on_part = on_part  # the answer, and the seconds that its part waited here
        self._on_dispatch = on_dispatch
        self._timer: asyncio.TimerHandle | None = None  # of what is being gathered
        self._waiting: dict[str, list[_Ticket]] = {}  # client -> tickets with pending parts
        self._served: dict[str, float] = {}  # client -> detections it was served, on a common clock
        self._clock = 0.0  # what a client's fair share came to, had it waited all the time
        self._yielded: set[str] = set()  # clients whose last turn went to a starving request
        self._again: list[_Part] = []  # parts of dead workers: alone, and before everything else
        self._alone = False  # such a part is inside
        self._sent: Counter[str] = Counter()  # engine -> detections inside Mosec
        self._parts = 0  # likewise
        self._tickets: set[_Ticket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rates: dict[str, _Rate] = {}  # by engine

    # ------------------------------------------------------------------------------------------------- numbers

    @property
    def _workers(self) -> int:
        """Pose workers that can take work, at least one: those that died count again when they are back."""
        return max(1, self._backend.worker_counts()["pose"])

    @property
    def _window(self) -> int:
        """Detections that may be inside Mosec."""
        return self._settings.passes_in_flight * self._pass * self._workers

    def detections_per_second(self, engine: str) -> float:
        """An engine's measured throughput with all workers that are there."""
        rate = self._rate(engine)
        rate.seed(float(self._backend.pose_info().get("detections_per_second", {}).get(engine, 0.0)))
        return max(rate.value * self._workers, 1e-3)

    def _rate(self, engine: str) -> _Rate:
        return self._rates.setdefault(engine, _Rate())

    def _seconds(self, detections: Mapping[str, float]) -> float:
        """How long so many detections of each engine take."""
        return math.fsum(count / self.detections_per_second(engine) for engine, count in detections.items() if count)

    @property
    def requests(self) -> int:
        """Requests waiting or running."""
        return len(self._tickets)

    @property
    def detections(self) -> int:
        """Detections waiting or running."""
        return self._inside + self._queued

    @property
    def waiting_detections(self) -> int:
        """Detections that wait here, outside the backend."""
        return self._queued

    @property
    def _inside(self) -> int:
        return self._sent.total()

    @property
    def _queued(self) -> int:
        return sum(t.remaining for tickets in self._waiting.values() for t in tickets) + sum(
            p.cost for p in self._again
        )

    def admit(self, client: str, count: int, deadline_s: float, engine: str) -> None:
        """Raise where `count` more detections of this client, for `engine`, could not be answered in `deadline_s`."""
        rate = self.detections_per_second(engine)
        is_sure = self._rate(engine).is_sure
        alone_s = self._alone_s(count, engine)
        if deadline_s < _LEAST_S or (is_sure and alone_s / _SURE > deadline_s):
            what = f"{count} detections take" if count != 1 else "1 detection takes"
            raise ApiError(
                "deadline_too_short",
                f"{what} about {alone_s:.2g} s on this server ({rate:.3g} a second); "
                f"the deadline is {deadline_s:.3g} s",
                field="deadline_ms",
            )
        queued = self._queued
        ahead = self._ahead(client, count)
        ahead_s = self._seconds(ahead)
        promised_s = _PROMISED * deadline_s
        if ahead_s and (is_sure or queued) and ahead_s + alone_s > promised_s:
            raise ApiError(
                "over_capacity",
                f"{math.fsum(ahead.values()):.0f} detections are ahead, about {ahead_s:.1f} s of work; "
                f"the deadline is {deadline_s:.3g} s",
                retry_after_s=ahead_s + alone_s - promised_s,
            )
        ceiling = self._settings.ceiling_detections
        share = ceiling / len(self._waiting.keys() | {client})  # a client that floods the queue does not close it
        if queued and queued + count > ceiling and self._queued_by(client) + count > share:
            raise ApiError(
                "over_capacity",
                f"{queued} detections are queued; at most {ceiling} may wait",
                retry_after_s=(queued + count - ceiling) / rate,
            )

    def _alone_s(self, count: int, engine: str) -> float:
        """How long `count` detections take where nothing else is done: workers share passes, on a CPU detections."""
        pieces = max(1, -(-count // self._pass) if on_gpu(self._backend.stages) else count)
        rounds = -(-pieces // self._workers)
        return rounds * (count / pieces) * self._workers / self.detections_per_second(engine)

    def _queued_by(self, client: str) -> int:
        return sum(ticket.remaining for ticket in self._waiting.get(client, []))

    def _ahead(self, client: str, count: int) -> dict[str, float]:
        """Detections, by engine, that will be worked on before the last of `count` new ones of this client.

        Turns are considered; what goes before of another client's is spread over its engines as they stand in line.
        """
        ahead: defaultdict[str, float] = defaultdict(float, self._sent)
        for part in self._again:
            ahead[part.engine] += part.cost
        mine = 0
        for ticket in self._waiting.get(client, []):
            if ticket.remaining <= count:
                mine += ticket.remaining
                ahead[ticket.job.engine] += ticket.remaining
        standing = self._standing(client)
        for other, tickets in self._waiting.items():
            queued = self._queued_by(other)
            if other == client or not queued:
                continue
            before_mine = min(queued, mine + count + max(0, math.ceil(standing - self._served[other])))
            for ticket in tickets:
                ahead[ticket.job.engine] += ticket.remaining * before_mine / queued
        return ahead

    def _standing(self, client: str) -> float:
        """What a client was served, on the common clock: one that comes (back) starts where the others are."""
        served = self._served.get(client, 0.0)
        return served if client in self._waiting else max(served, self._clock)

    # ----------------------------------------------------------------------------------------------------- work

    async def solve(self, job: Job, client: str, deadline: float) -> Solution:
        """Rows for a request. `deadline` is monotonic. Cancelling it drops what has not started.

        Raises ApiError: what the pipeline found wrong, the deadline, or a worker lost for good.
        """
        encoded = _encode(job)
        path = self._run_dir.put(f"{job.request_id}-{time.monotonic_ns():x}", encoded)
        job = msgspec.structs.replace(job, rgb=b"", depth=b"")  # nobody holds pictures while they wait
        if path is not None:
            encoded = b""
        ticket = _Ticket(
            job=job,
            client=client,
            arrived=time.monotonic(),
            deadline=deadline,
            path=path,
            encoded=encoded,
            pending=[],
            done=asyncio.get_running_loop().create_future(),
        )
        ticket.pending = self._split(ticket)
        parts = len(ticket.pending)
        self._tickets.add(ticket)
        self._wait(ticket)
        try:
            self._pump()
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(deadline - time.monotonic(), 0.0)):
                await ticket.done
            if parts > 1 and (job.visualize or job.output_dir):
                return await self._finish(ticket)
            return _merge(ticket)
        except TimeoutError:
            raise ApiError("deadline", "the deadline passed before the answer was ready") from None
        finally:
            self._close(ticket)

    def _wait(self, ticket: _Ticket) -> None:
        """Into the line, unless it stands there already."""
        self._served[ticket.client] = self._standing(ticket.client)
        tickets = self._waiting.setdefault(ticket.client, [])
        if ticket not in tickets:
            tickets.append(ticket)

    def _split(self, ticket: _Ticket) -> list[_Part]:
        count = len(ticket.job.detections)
        size = self._pass if on_gpu(self._backend.stages) else min(self._pass, -(-count // self._idle_workers) or 1)
        starts = range(0, count, size) if count else [0]
        bounds = [(start, min(start + size, count)) for start in starts]
        inline = b"" if ticket.path else ticket.encoded
        return [
            _Part(
                ticket,
                Part(
                    part_id=f"{ticket.job.request_id}/{index}",
                    start=start,
                    stop=stop,
                    path=ticket.path,
                    job=inline,
                    finish=len(bounds) == 1,
                ),
            )
            for index, (start, stop) in enumerate(bounds)
        ]

    def _pump(self) -> None:
        """Send what there is room for. A retried part goes alone: it waits for the others, and the others for it."""
        if not self._backend.is_ready or self._alone:
            return
        if self._again:
            if self._inside == 0:
                self._alone = True
                self._send(self._again.pop(0))
            return
        while (reason := self._why_now()) is not None:
            room = self._pass
            while room > 0 and (part := self._next()) is not None:
                self._send(part)
                room -= part.cost
            if room == self._pass:
                return  # nothing waits, or there is no room for it
            self._on_dispatch(reason)

    @property
    def _idle_workers(self) -> int:
        """How many pose workers nobody has work for, at least one."""
        return max(1, self._workers - self._parts) if not self._waiting else 1

    def _why_now(self) -> str | None:
        """Why what waits may be sent now; None where nothing waits or it is to be gathered for a moment longer."""
        if not self._waiting:
            return None
        if self._parts < self._workers:
            return "idle"
        if self._queued >= self._pass:
            return "full"
        oldest = min(ticket.arrived for tickets in self._waiting.values() for ticket in tickets)
        left_s = oldest + self._gather_s - time.monotonic()
        if left_s <= 0:
            return "window"
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._gathered)
        return None

    def _gathered(self) -> None:
        self._timer = None
        self._pump()

    def _next(self) -> _Part | None:
        """The part whose turn it is, taken off its queue; None where nothing waits or there is no room for it."""
        self._drop_expired()
        if not self._waiting:
            return None
        client = min(self._waiting, key=lambda name: (self._served[name], self._queued_by(name)))
        tickets = self._waiting[client]
        now = time.monotonic()
        starving = [t for t in tickets if now - t.arrived > (t.deadline - t.arrived) / 2]
        yielding = bool(starving) and client not in self._yielded
        ticket = (
            min(starving, key=lambda t: t.deadline)
            if yielding
            else min(tickets, key=lambda t: (t.remaining, t.arrived))
        )
        part = ticket.pending[0]
        if self._inside and self._inside + part.cost > self._window:
            return None
        (self._yielded.add if yielding else self._yielded.discard)(client)
        ticket.pending.pop(0)
        self._clock += part.cost / len(self._waiting)  # always forward: newcomers cannot keep others from their turn
        self._served[client] += part.cost
        if not ticket.pending:
            self._leave(ticket)
        return part

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for tickets in list(self._waiting.values()):
            for ticket in list(tickets):
                if ticket.deadline <= now:
                    self._fail(ticket, ApiError("deadline", "the deadline passed while the request was waiting"))

    def _send(self, part: _Part) -> None:
        ticket = part.ticket
        now = time.monotonic()
        part.waited_s = now - ticket.arrived
        ticket.running += 1
        self._sent[part.engine] += part.cost
        self._parts += 1
        task = asyncio.create_task(self._run(part))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, part: _Part) -> None:
        ticket = part.ticket
        limit_s = max(ticket.deadline - time.monotonic(), 0.0) + self._backend.stages.pose.max_seconds + _SLACK_S
        try:
            call = self._backend.call("/pose", part.part.part_id, _encode(part.part))
            answer = _decode_answer(await asyncio.wait_for(call, limit_s))
            if isinstance(answer, Failure):
                self._fail(ticket, from_failure(answer))
            else:
                for record in answer.passes:
                    self._rate(record.engine).add(record)
                self._on_part(answer, part.waited_s)
                ticket.answers[part.part.start] = answer
        except Interrupted as interruption:
            part.attempts += interruption.held
            await asyncio.sleep(_PAUSE_BEFORE_RETRY_S)
            self._retry(part, held=interruption.held)
        except TimeoutError:  # long after its deadline: whoever held it is gone without a trace
            log.error("part_lost", request_id=ticket.job.request_id, part_id=part.part.part_id)
            self._fail(ticket, ApiError("deadline", "the deadline passed before the answer was ready"))
        except (BackendError, msgspec.DecodeError) as error:
            log.error("pipeline_error", request_id=ticket.job.request_id, error=str(error))
            self._fail(ticket, internal_error())
        except Exception:
            log.exception("queue_error", request_id=ticket.job.request_id)
            self._fail(ticket, internal_error())
        finally:
            ticket.running -= 1
            self._sent[part.engine] -= part.cost
            self._parts -= 1
            if self._inside == 0:
                self._alone = False
            if not ticket.running and not ticket.pending and not any(p.ticket is ticket for p in self._again):
                if not ticket.done.done():
                    ticket.done.set_result(None)
                if ticket.closed:
                    self._run_dir.drop(ticket.path)
            self._pump()

    def _retry(self, part: _Part, *, held: bool) -> None:
        ticket = part.ticket
        if ticket.closed or ticket.done.done():
            return
        if part.attempts > self._settings.retries:
            self._fail(
                ticket,
                worker_lost(),
            )
            return
        log.warning(
            "part_sent_again",
            request_id=ticket.job.request_id,
            part_id=part.part.part_id,
            attempts=part.attempts,
            held=held,
        )
        if held and self._backend.stages.pose.batch_requests != 1:  # in a batch of one it takes nobody along
            self._again.append(part)
        else:
            ticket.pending.insert(0, part)
            self._wait(ticket)

    def _fail(self, ticket: _Ticket, error: ApiError) -> None:
        if not ticket.done.done():
            ticket.done.set_exception(error)
            ticket.done.exception()  # looked at, also where nobody waits any more
        self._abandon(ticket)

    def _abandon(self, ticket: _Ticket) -> None:
        """Nothing more of it is started."""
        ticket.pending.clear()
        self._again = [part for part in self._again if part.ticket is not ticket]
        self._leave(ticket)

    def _leave(self, ticket: _Ticket) -> None:
        tickets = self._waiting.get(ticket.client)
        if tickets is not None:
            with contextlib.suppress(ValueError):
                tickets.remove(ticket)
            if not tickets:
                del self._waiting[ticket.client]
        if len(self._served) > 1024:  # clients come and go: keep only those that wait
            keep = {one.client for one in self._tickets} | self._waiting.keys()
            self._served = {client: served for client, served in self._served.items() if client in keep}
            self._yielded &= keep

    def _close(self, ticket: _Ticket) -> None:
        self._abandon(ticket)
        ticket.closed = True
        self._tickets.discard(ticket)
        if not ticket.running:
            self._run_dir.drop(ticket.path)
        self._pump()

    async def _finish(self, ticket: _Ticket) -> Solution:
        """Overlay and files of a request that was split."""
        message = FinishPart(
            part_id=f"{ticket.job.request_id}/finish",
            path=ticket.path,
            job=b"" if ticket.path else ticket.encoded,
            rows=_merge(ticket).rows,
        )
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(ticket.deadline - time.monotonic(), 0.0)):
            try:
                body = await self._backend.call_with_retries(
                    "/finish", message.part_id, _encode(message), retries=self._settings.retries
                )
            except Interrupted:
                raise worker_lost() from None
        answer = _decode_answer(body)
        if isinstance(answer, Failure):
            raise from_failure(answer)
        self._on_part(answer, 0.0)
        return _merge(ticket, answer)

    # --------------------------------------------------------------------------------------------------- events

    def fail_all(self, error: ApiError) -> None:
        """Answer everything with `error`, whatever it was doing."""
        for ticket in list(self._tickets):
            self._fail(ticket, error)

    def wake(self) -> None:
        """The backend is ready (again)."""
        self._pump()

    async def keep_order(self) -> None:
        """For ever: let waiting requests meet their deadlines, and give up on a backend that stays away."""
        while True:
            await asyncio.sleep(0.25)
            self._drop_expired()
            if self._backend.down_s > _LONGEST_BACKEND_OUTAGE_S:
                self.fail_all(
                    ApiError("not_ready", "the pose workers do not come back; the log says why", retry_after_s=10)
                )
            self._pump()


def _merge(ticket: _Ticket, *more: PartAnswer) -> Solution:
    """What its parts, and `more` that was done for all of them, come to."""
    answers = [ticket.answers[start] for start in sorted(ticket.answers)]
    warnings = list(dict.fromkeys(warning for answer in answers for warning in answer.warnings))
    largest = max(answers, key=lambda answer: answer.batch_detections)
    asked = ticket.job.engine
    now_unix = time.time()
    return Solution(
        rows=[row for answer in answers for row in answer.rows],
        engine=next((answer.engine for answer in answers if answer.engine != asked), asked),
        warnings=warnings,
        receipt=receipt(
            [*answers, *more], arrived_unix=now_unix - (time.monotonic() - ticket.arrived), done_unix=now_unix
        ),
        batch_detections=largest.batch_detections,
        batch_requests=largest.batch_requests,
        visualization=next((one.visualization for one in (*more, *answers) if one.visualization is not None), None),
        output_written=any(one.output_written for one in (*more, *answers)),
    )
