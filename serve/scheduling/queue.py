"""The queue in front of the device stage: admission, turns, deadlines, retries. It knows tasks through work.py.

Mosec gathers batches but knows neither clients nor deadlines, and a worker takes nothing new until its whole batch is
back. So only a few passes' worth of work are inside Mosec at any time, and everything else waits here:

- Clients take turns: the one that was served least goes next. Within a client, the request with the least left to do
  goes first, except that a request that has waited for half its deadline gets every second turn.
- A request larger than a pass is split into parts; its task merges their answers. On a CPU, where a worker does one
  thing after the other, a request that finds several workers idle is split between them.
- While a worker is idle, everything is sent at once. While all are busy, new work is gathered until it fills a pass,
  for at most `pose.batch_wait_ms`. `on_dispatch` is told which it was ("idle", "full" or "window").
- A request that could not be answered in time is refused on arrival (429 with Retry-After, or 422 if even an idle
  server could not). Work whose deadline has passed, or whose client has gone, is dropped before it starts.
- A part whose worker died is sent again, alone this time, so that it cannot take others down twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import structlog

from serve.backend.mosec import Backend, BackendError, Interrupted
from serve.backend.run_dir import RunDir
from serve.errors import ApiError, from_failure, internal_error, worker_lost
from serve.scheduling.work import Answered, Share, Work
from serve.settings import Queue as QueueSettings
from workers.messages import Failure, PassRecord
from workers.settings import on_gpu

log = structlog.get_logger()

A = TypeVar("A", bound=Answered)

#: Used before anything was measured: cautious for the ceiling, generous for `deadline_too_short`.
_UNMEASURED_RATE = 5.0
_PROMISED = 0.8  # share of a deadline that others' work may fill: admitted requests must be answered in time
_LEAST_S = 0.01  # no answer is faster, whatever is measured
_FORGET = 0.9  # share of the past that each pass leaves in the measured rate
_SURE = 2.0  # factor by which the measured rate may be off before a deadline is called impossible
_SURE_AFTER = 3  # passes that must have been measured, and
_SURE_FOR_S = 60.0  # how recently: a rate that admits nothing would never be measured again
_LONGEST_BACKEND_OUTAGE_S = 60.0
_PAUSE_BEFORE_RETRY_S = 0.05
_SLACK_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Gathered(Generic[A]):
    """The backend's answers to all shares of a request, in order, and the place of the encoded request."""

    answers: list[A]
    path: str | None
    inline: bytes
    arrived_unix: float


@dataclass(eq=False)
class _Part:
    ticket: _Ticket
    share: Share
    attempts: int = 0
    waited_s: float = 0.0

    @property
    def cost(self) -> int:
        return self.share.cost

    @property
    def engine(self) -> str:
        return self.ticket.work.engine


@dataclass(eq=False)
class _Ticket:
    work: Work[Any]
    client: str
    arrived: float
    deadline: float  # monotonic
    path: str | None
    inline: bytes
    done: asyncio.Future[None]
    parts: list[_Part] = field(default_factory=list)  # all parts, in order
    pending: list[_Part] = field(default_factory=list)  # the parts that wait here
    answers: dict[_Part, Any] = field(default_factory=dict)
    running: int = 0
    closed: bool = False

    @property
    def remaining(self) -> int:
        return sum(part.cost for part in self.pending)


class _Rate:
    """Measured cost per second of one engine on one device; recent passes count more."""

    def __init__(self) -> None:
        self._cost = 0.0
        self._seconds = 0.0
        self._passes = 0
        self._latest = 0.0

    def seed(self, per_second: float) -> None:
        if self._seconds == 0 and per_second > 0:
            self._cost, self._seconds = per_second, 1.0

    def add(self, record: PassRecord) -> None:
        self._cost = self._cost * _FORGET + record.detections
        self._seconds = self._seconds * _FORGET + record.seconds
        self._passes += 1
        self._latest = time.monotonic()

    @property
    def value(self) -> float:
        return self._cost / self._seconds if self._seconds > 1e-6 else _UNMEASURED_RATE

    @property
    def is_sure(self) -> bool:
        return self._passes >= _SURE_AFTER and time.monotonic() - self._latest < _SURE_FOR_S


class Queue:
    """All work that waits for the device stage of one backend."""

    def __init__(
        self,
        backend: Backend,
        run_dir: RunDir,
        settings: QueueSettings,
        *,
        pass_cost: int,
        on_part: Callable[[Any, float], None],
        on_dispatch: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._backend = backend
        self._run_dir = run_dir
        self._settings = settings
        self._pass = pass_cost
        self._gather_s = backend.stages.pose.batch_wait_ms / 1000
        self.on_part = on_part  # called with the answer, and the seconds that its part waited here
        self._on_dispatch = on_dispatch
        self._timer: asyncio.TimerHandle | None = None  # of the work being gathered
        self._waiting: dict[str, list[_Ticket]] = {}  # client -> tickets with pending parts
        self._served: dict[str, float] = {}  # client -> cost that it was served, on a common clock
        self._clock = 0.0  # fair share of a client that had waited all the time
        self._yielded: set[str] = set()  # clients whose last turn went to a starving request
        self._again: list[_Part] = []  # parts of dead workers: alone, and before everything else
        self._alone = False  # such a part is in the backend
        self._sent: Counter[str] = Counter()  # engine -> cost inside Mosec
        self._parts = 0  # number of parts inside Mosec
        self._tickets: set[_Ticket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rates: dict[str, _Rate] = {}  # by engine

    # ------------------------------------------------------------------------------------------------- numbers

    @property
    def _workers(self) -> int:
        """Return the number of pose workers that can take work, at least one; dead ones count once they are back."""
        return max(1, self._backend.worker_counts()["pose"])

    @property
    def _window(self) -> int:
        """Return the cost that may be inside Mosec."""
        return self._settings.passes_in_flight * self._pass * self._workers

    def per_second(self, engine: str) -> float:
        """Return the cost that an engine works off in a second, as measured, with all current workers."""
        rate = self._rate(engine)
        rate.seed(float(self._backend.pose_info().get("detections_per_second", {}).get(engine, 0.0)))
        return max(rate.value * self._workers, 1e-3)

    def _rate(self, engine: str) -> _Rate:
        return self._rates.setdefault(engine, _Rate())

    def _seconds(self, costs: Mapping[str, float]) -> float:
        """Return the seconds that the cost given for each engine takes, one engine after the other."""
        return math.fsum(cost / self.per_second(engine) for engine, cost in costs.items() if cost)

    @property
    def requests(self) -> int:
        """Return the number of requests waiting or running."""
        return len(self._tickets)

    @property
    def cost(self) -> int:
        """Return the cost of what waits or runs."""
        return self._inside + self._queued

    @property
    def waiting(self) -> int:
        """Return the cost of what waits here, outside the backend."""
        return self._queued

    @property
    def _inside(self) -> int:
        return self._sent.total()

    @property
    def _queued(self) -> int:
        return sum(t.remaining for tickets in self._waiting.values() for t in tickets) + sum(
            p.cost for p in self._again
        )

    def admit(self, client: str, count: int, deadline_s: float, engine: str, unit: str) -> None:
        """Raise if `count` more of this client's, for `engine`, could not be answered in `deadline_s`.

        `unit` is what the task counts, in the singular, for the text of a refusal.
        """
        rate = self.per_second(engine)
        is_sure = self._rate(engine).is_sure
        alone_s = self._alone_s(count, engine)
        if deadline_s < _LEAST_S or (is_sure and alone_s / _SURE > deadline_s):
            what = f"{count} {unit}s take" if count != 1 else f"1 {unit} takes"
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
                f"{math.fsum(ahead.values()):.0f} {unit}s are ahead, about {ahead_s:.1f} s of work; "
                f"the deadline is {deadline_s:.3g} s",
                retry_after_s=ahead_s + alone_s - promised_s,
            )
        ceiling = self._settings.ceiling_detections
        share = ceiling / len(self._waiting.keys() | {client})  # one flooding client does not close it
        if queued and queued + count > ceiling and self._queued_by(client) + count > share:
            raise ApiError(
                "over_capacity",
                f"{queued} {unit}s are queued; at most {ceiling} may wait",
                retry_after_s=(queued + count - ceiling) / rate,
            )

    def _alone_s(self, count: int, engine: str) -> float:
        """Return the seconds for a cost with nothing else running: workers share its passes, on a CPU its units."""
        pieces = max(1, -(-count // self._pass) if on_gpu(self._backend.stages) else count)
        rounds = -(-pieces // self._workers)
        return rounds * (count / pieces) * self._workers / self.per_second(engine)

    def _queued_by(self, client: str) -> int:
        return sum(ticket.remaining for ticket in self._waiting.get(client, []))

    def _ahead(self, client: str, count: int) -> dict[str, float]:
        """Return the cost, by engine, that is worked off before the last of `count` more of this client's.

        Turns are considered. The cost of another client that goes before is spread over its engines as they stand in
        line.
        """
        ahead: defaultdict[str, float] = defaultdict(float, self._sent)
        for part in self._again:
            ahead[part.engine] += part.cost
        mine = 0
        for ticket in self._waiting.get(client, []):
            if ticket.remaining <= count:
                mine += ticket.remaining
                ahead[ticket.work.engine] += ticket.remaining
        standing = self._standing(client)
        for other, tickets in self._waiting.items():
            queued = self._queued_by(other)
            if other == client or not queued:
                continue
            before_mine = min(queued, mine + count + max(0, math.ceil(standing - self._served[other])))
            for ticket in tickets:
                ahead[ticket.work.engine] += ticket.remaining * before_mine / queued
        return ahead

    def _standing(self, client: str) -> float:
        """Return the cost that a client was served, on the common clock; newcomers start level with the others."""
        served = self._served.get(client, 0.0)
        return served if client in self._waiting else max(served, self._clock)

    # ----------------------------------------------------------------------------------------------------- work

    @contextlib.asynccontextmanager
    async def worked_off(self, work: Work[A], client: str, deadline: float) -> AsyncIterator[Gathered[A]]:
        """Yield all answers of the backend for a request; `deadline` is monotonic and limits the block as well.

        The encoded request is removed when the block ends. Cancelling drops what has not started. Raises ApiError: for
        errors that the pipeline found, for the deadline, or for a worker lost for good.
        """
        encoded = work.encoded()
        path = self._run_dir.put(f"{work.request_id}-{time.monotonic_ns():x}", encoded)
        loop = asyncio.get_running_loop()
        ticket = _Ticket(
            work=work,
            client=client,
            arrived=time.monotonic(),
            deadline=deadline,
            path=path,
            inline=b"" if path is not None else encoded,
            done=loop.create_future(),
        )
        del encoded
        ticket.parts = [_Part(ticket, share) for share in work.split(self._share_size(work.cost))]
        ticket.pending = list(ticket.parts)
        self._tickets.add(ticket)
        self._wait(ticket)
        try:
            self._pump()
            async with asyncio.timeout_at(loop.time() + max(deadline - time.monotonic(), 0.0)):
                await ticket.done
                yield Gathered(
                    answers=[ticket.answers[part] for part in ticket.parts],
                    path=path,
                    inline=ticket.inline,
                    arrived_unix=time.time() - (time.monotonic() - ticket.arrived),
                )
        except TimeoutError:
            raise ApiError("deadline", "the deadline passed before the answer was ready") from None
        finally:
            self._close(ticket)

    async def call_again(self, route: str, call_id: str, payload: bytes) -> bytes:
        """Send one more message for a request that was worked off, and again if a worker died with it."""
        return await self._backend.call_with_retries(route, call_id, payload, retries=self._settings.retries)

    def _wait(self, ticket: _Ticket) -> None:
        """Put a ticket into the line, unless it is there already."""
        self._served[ticket.client] = self._standing(ticket.client)
        tickets = self._waiting.setdefault(ticket.client, [])
        if ticket not in tickets:
            tickets.append(ticket)

    def _share_size(self, cost: int) -> int:
        """Return the largest cost of one part of a request: a pass, and on a CPU each idle worker's share of one."""
        return self._pass if on_gpu(self._backend.stages) else min(self._pass, -(-cost // self._idle_workers) or 1)

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
                return  # nothing waits, or there is no room
            self._on_dispatch(reason)

    @property
    def _idle_workers(self) -> int:
        """Return the number of pose workers without work, at least one."""
        return max(1, self._workers - self._parts) if not self._waiting else 1

    def _why_now(self) -> str | None:
        """Return why waiting work may be sent now; None if nothing waits, or while more work is to be gathered."""
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
        """Take the next part off its client's queue; None if nothing waits or there is no room for it."""
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
        if self._inside + part.cost > self._window:
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
            message = part.share.message(path=ticket.path, inline=ticket.inline)
            call = self._backend.call(ticket.work.route, part.share.share_id, message)
            answer = ticket.work.read(await asyncio.wait_for(call, limit_s))
            if isinstance(answer, Failure):
                self._fail(ticket, from_failure(answer))
            else:
                for record in answer.passes:
                    self._rate(record.engine).add(record)
                self.on_part(answer, part.waited_s)
                ticket.answers[part] = answer
        except Interrupted as interruption:
            part.attempts += interruption.held
            await asyncio.sleep(_PAUSE_BEFORE_RETRY_S)
            self._retry(part, held=interruption.held)
        except TimeoutError:  # long after its deadline: its holder is gone without a trace
            log.error("part_lost", request_id=ticket.work.request_id, part_id=part.share.share_id)
            self._fail(ticket, ApiError("deadline", "the deadline passed before the answer was ready"))
        except (BackendError, msgspec.DecodeError) as error:
            log.error("pipeline_error", request_id=ticket.work.request_id, error=str(error))
            self._fail(ticket, internal_error())
        except Exception:
            log.exception("queue_error", request_id=ticket.work.request_id)
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
            self._fail(ticket, worker_lost())
            return
        log.warning(
            "part_sent_again",
            request_id=ticket.work.request_id,
            part_id=part.share.share_id,
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
            ticket.done.exception()  # marks it as seen, also if nobody waits any more
        self._abandon(ticket)

    def _abandon(self, ticket: _Ticket) -> None:
        """Start nothing more of a ticket."""
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

    # --------------------------------------------------------------------------------------------------- events

    def fail_all(self, error: ApiError) -> None:
        """Answer everything with `error`, whatever its state."""
        for ticket in list(self._tickets):
            self._fail(ticket, error)

    def wake(self) -> None:
        """Continue: the backend is ready (again)."""
        self._pump()

    async def keep_order(self) -> None:
        """Enforce the deadlines of waiting requests, for ever, and give up on a backend that stays away."""
        while True:
            await asyncio.sleep(0.25)
            self._drop_expired()
            if self._backend.down_s > _LONGEST_BACKEND_OUTAGE_S:
                self.fail_all(
                    ApiError("not_ready", "the pose workers do not come back; the log says why", retry_after_s=10)
                )
            self._pump()
