"""Generate load on a server: a closed loop of clients that wait for answers, or an open loop of random arrivals.

In a closed loop a slow server is asked less, so the clients themselves hide its queue. In an open loop requests arrive
as a Poisson process, whatever the server does, and latency counts from when each was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from pem.bench.judge import Heard, Judge, UnreadableAnswer, Verdict, error_code, refusal_in_words
from pem.bench.observe import Observed, Observer, key_headers
from pem.bench.sample import Question, Run, Sample, Target
from pem.bench.wire import Address, Answer, Connection, NoAnswer, Pool, Timeout

TIMEOUT_S: Final = 60.0  # for one answer
PATH: Final = "/api/v1/pose_estimation"
_LONGEST_WAIT_S: Final = 1.0  # of a client that was told to come back later
_AFTER_ERROR_S: Final = 0.1  # pause, so that a server that refuses everything is not asked in a busy loop
_TELL_S: Final = 0.5
_ALONE_TRIES: Final = 5
_MOST_OPEN: Final = 4096  # requests at a time; more must wait, and their latency includes the wait
_GRACE_S: Final = 1.0  # time after one time-out during which an open loop waits for its last requests


class CannotBegin(Exception):
    """The server does not answer the questions even one by one; the message holds its words."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run, reported about twice a second."""

    seconds_left: float  # of warm-up and measured part together
    requests: int  # answered with 200 in the measured part so far
    poses_hz: float  # rows answered a second, judged or not, over the measured part so far
    errors: int  # answers other than 200 and 429


async def closed_loop(
    target: Target,
    questions: Sequence[Question],
    *,
    clients: int,
    seconds: float,
    warmup_s: float = 3.0,
    think_s: float = 0.0,
    timeout_s: float = TIMEOUT_S,
    judge: Judge | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Run `clients` clients that each send their next request `think_s` after the answer to the last.

    The samples are the requests that were answered in the measured part, and those that fail after its end: they were
    sent in it. A client that is told to come back later (429) waits as told, but a second at most. `judge`: one for the
    same questions from earlier runs, so that the questions are not asked alone again. Raises CannotBegin.
    """
    if clients < 1 or seconds <= 0:
        raise ValueError("a closed loop needs at least one client and some time")
    work = await _Work.ready(target, questions, judge, timeout_s)
    stop = asyncio.Event()

    async def client(number: int) -> None:
        connection = work.connection()
        index = number * len(questions) // clients  # clients begin at different questions
        try:
            while not stop.is_set():
                answered = await work.ask(connection.ask, index % len(questions), number)
                index += 1
                if (wait_s := _wait_s(answered) + think_s) > 0:
                    with contextlib.suppress(TimeoutError):
                        async with Timeout(wait_s):
                            await stop.wait()
        finally:
            connection.close()

    running = [asyncio.create_task(client(number)) for number in range(clients)]
    async with _cancelled_at_the_end(running):
        part = await work.measure(seconds, warmup_s, on_progress, running)
        stop.set()
        await asyncio.gather(*running)
    samples = [
        sample
        for sample in work.samples()
        if part.begun <= sample.done < part.ended or (sample.done >= part.ended and sample.status not in (200, 429))
    ]
    return work.run("closed", part, samples, clients=clients)


async def open_loop(
    target: Target,
    questions: Sequence[Question],
    *,
    rate_hz: float,
    seconds: float,
    warmup_s: float = 3.0,
    seed: int = 0,
    timeout_s: float = TIMEOUT_S,
    judge: Judge | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Send requests as a Poisson process, `rate_hz` on average, with any number open at a time.

    The samples are all requests that were due in the measured part. Those still open at its end are awaited for one
    time-out and a second. Requests that waited behind 4096 others count as `never_sent` if they had no turn within
    `timeout_s`, and as `cut_off` if their turn came so late that the wait ended before the answer. `seed`: of the
    moments and the order of the questions. Otherwise as `closed_loop`.
    """
    if rate_hz <= 0 or seconds <= 0:
        raise ValueError("an open loop needs a rate above 0 and some time")
    work = await _Work.ready(target, questions, judge, timeout_s)
    pool = Pool(work.address, timeout_s)
    rng = np.random.default_rng(seed)
    open_: set[asyncio.Task[Any]] = set()
    broken: list[BaseException] = []
    most_open = 0
    room = asyncio.Semaphore(_MOST_OPEN)

    async def one(index: int, number: int, due: float) -> None:
        try:
            async with Timeout(timeout_s):
                await room.acquire()
        except TimeoutError:
            work.keep(index, number, due, time.monotonic(), error="never_sent")
            return
        except asyncio.CancelledError:
            work.keep(index, number, due, time.monotonic(), error="never_sent")
            raise
        sent = time.monotonic()
        try:
            await work.ask(pool.ask, index, number, due)
        except asyncio.CancelledError:
            work.keep(index, number, due, sent, error="cut_off")
            raise
        finally:
            room.release()

    def over(task: asyncio.Task[None]) -> None:
        open_.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            broken.append(error)

    async def arrivals() -> None:
        nonlocal most_open
        due = time.monotonic()
        number = 0
        order = rng.permutation(len(questions))
        while True:
            due += float(rng.exponential(1 / rate_hz))
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(one(int(order[number % len(order)]), number, due))
            open_.add(task)
            task.add_done_callback(over)
            most_open = max(most_open, len(open_))
            number += 1

    coming = asyncio.create_task(arrivals())
    async with _cancelled_at_the_end([coming], open_):
        part = await work.measure(seconds, warmup_s, on_progress, [coming])
        coming.cancel()
        given_up = time.monotonic() + timeout_s + _GRACE_S
        while open_ and (left := given_up - time.monotonic()) > 0:
            await asyncio.wait(open_, timeout=min(_TELL_S, left))
            work.tell(on_progress, part.ended, part.begun)
        # requests that are still open record their end when this block cancels them
        if broken:
            raise broken[0]
    pool.close()
    samples = work.samples()
    measured = [sample for sample in samples if part.begun <= sample.due < part.ended]
    carried = [sample for sample in samples if sample.due < part.begun <= sample.done < part.ended]
    return work.run("open", part, measured, clients=most_open, carried=carried, rate_hz=rate_hz)


@asynccontextmanager
async def _cancelled_at_the_end(*groups: list[asyncio.Task[Any]] | set[asyncio.Task[Any]]) -> AsyncIterator[None]:
    """Make sure that no task outlives the block, whatever happens in it."""
    try:
        yield
    finally:
        tasks = [task for group in groups for task in group]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _wait_s(answered: _Answered) -> float:
    """Return how long a client waits after an answer."""
    if answered.status == 200:
        return 0.0
    return min(answered.retry_after_s or _AFTER_ERROR_S, _LONGEST_WAIT_S)


# --------------------------------------------------------------------------------------------- what both have in common


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answered:
    """One exchange, as kept until the run is over."""

    index: int
    client: int
    due: float
    sent: float
    done: float
    status: int
    error: str
    retry_after_s: float | None
    heard: Heard | None


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """The measured part of a run."""

    begun: float
    ended: float
    observed: Observed


_Ask = Callable[[bytes, bytes], Coroutine[Any, Any, Answer]]


@dataclass(kw_only=True)
class _Work:
    """One run: its questions, ready to be sent, and all answers."""

    target: Target
    address: Address
    questions: Sequence[Question]
    heads: list[bytes]
    judge: Judge
    timeout_s: float
    observer: Observer
    answered: list[_Answered] = field(default_factory=list)
    done: int = 0  # answered with 200
    rows: int = 0
    errors: int = 0

    @classmethod
    async def ready(cls, target: Target, questions: Sequence[Question], judge: Judge | None, timeout_s: float) -> _Work:
        """Prepare everything, and ask every question once, alone."""
        if not questions:
            raise ValueError("there is nothing to ask")
        address = Address.of(target.url)
        heads = [
            address.head(
                "POST",
                PATH,
                len(question.body),
                {"Content-Type": question.content_type, **question.headers, **key_headers(target)},
            )
            for question in questions
        ]
        judge = judge or Judge(questions)
        if len(judge.questions) != len(questions):
            raise ValueError("the judge was made for other questions")
        work = cls(
            target=target,
            address=address,
            questions=questions,
            heads=heads,
            judge=judge,
            timeout_s=timeout_s,
            observer=Observer(target),
        )
        if not judge.knows_alone:
            await work._ask_alone()
        return work

    def connection(self) -> Connection:
        return Connection(self.address, self.timeout_s)

    async def _ask_alone(self) -> None:
        connection = self.connection()
        try:
            for index, question in enumerate(self.questions):
                answer = await self._ask_until_answered(connection, index)
                content_type = answer.headers.get("content-type", "")
                if answer.status != 200:
                    which = f"{question.name} (question {index + 1})"
                    words = refusal_in_words(answer.body, content_type)
                    raise CannotBegin(f"asked alone, {which} was answered {answer.status} {words}")
                self.judge.learn(index, answer.body, content_type)
        except NoAnswer as error:
            raise CannotBegin(f"no answer from {self.target.url}: {error}") from None
        except UnreadableAnswer as error:
            raise CannotBegin(f"{self.target.url}: {error}") from None
        finally:
            connection.close()

    async def _ask_until_answered(self, connection: Connection, index: int) -> Answer:
        """Return the answer to one question; ask again if the server says that this may help."""
        for left in range(_ALONE_TRIES, 0, -1):
            answer = await connection.ask(self.heads[index], self.questions[index].body)
            if answer.retry_after_s is None or left == 1:
                break
            await asyncio.sleep(answer.retry_after_s)
        return answer

    async def ask(self, send: _Ask, index: int, client: int, due: float | None = None) -> _Answered:
        """Ask one question and keep the result."""
        sent = time.monotonic()
        try:
            answer = await send(self.heads[index], self.questions[index].body)
        except NoAnswer as trouble:
            return self.keep(index, client, due, sent, error=trouble.kind)
        done = time.monotonic()
        content_type = answer.headers.get("content-type", "")
        if answer.status != 200:
            return self.keep(
                index,
                client,
                due,
                sent,
                done=done,
                status=answer.status,
                error=error_code(answer.body, content_type),
                retry_after_s=answer.retry_after_s,
            )
        try:
            heard = self.judge.hear(index, answer.body, content_type)
        except UnreadableAnswer:
            return self.keep(index, client, due, sent, done=done, error="unreadable")
        return self.keep(index, client, due, sent, done=done, status=200, heard=heard)

    def keep(
        self,
        index: int,
        client: int,
        due: float | None,
        sent: float,
        *,
        done: float | None = None,
        status: int = 0,
        error: str = "",
        retry_after_s: float | None = None,
        heard: Heard | None = None,
    ) -> _Answered:
        """Record the result of a request; `due` None: when it was sent, `done` None: now."""
        answered = _Answered(
            index=index,
            client=client,
            due=sent if due is None else due,
            sent=sent,
            done=time.monotonic() if done is None else done,
            status=status,
            error=error,
            retry_after_s=retry_after_s,
            heard=heard,
        )
        self.answered.append(answered)
        self.done += status == 200
        self.rows += len(self.questions[index].truths) if status == 200 else 0
        self.errors += status not in (200, 429)
        return answered

    async def measure(
        self,
        seconds: float,
        warmup_s: float,
        on_progress: Callable[[Progress], None] | None,
        running: Sequence[asyncio.Task[Any]],
    ) -> _Measured:
        """Run warm-up and measured part while `running` makes the load; re-raise an exception of `running`."""
        begin = time.monotonic() + warmup_s
        await self._wait(begin, begin + seconds, None, on_progress, running)
        await self.observer.begin()
        self.done = self.rows = self.errors = 0
        begun = time.monotonic()
        await self._wait(begun + seconds, begun + seconds, begun, on_progress, running)
        ended = time.monotonic()
        return _Measured(begun=begun, ended=ended, observed=await self.observer.end())

    async def _wait(
        self,
        until: float,
        end: float,
        begun: float | None,
        on_progress: Callable[[Progress], None] | None,
        running: Sequence[asyncio.Task[Any]],
    ) -> None:
        """Wait until `until`, reporting progress: `end` is the measured part's end, `begun` None before its start."""
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(_TELL_S, left))
            for task in running:
                if task.done():
                    task.result()
            self.tell(on_progress, end, begun)

    def tell(self, on_progress: Callable[[Progress], None] | None, end: float, begun: float | None) -> None:
        """Report the run's progress; `end` and `begun` as in `_wait`."""
        if on_progress is None:
            return
        now = time.monotonic()
        measured = begun is not None and now > begun
        on_progress(
            Progress(
                seconds_left=max(0.0, end - now),
                requests=self.done if measured else 0,
                poses_hz=self.rows / (now - begun) if begun is not None and measured else 0.0,
                errors=self.errors if measured else 0,
            )
        )

    def samples(self) -> list[Sample]:
        """Return all samples, judged."""
        return [self._sample(answered) for answered in self.answered]

    def _sample(self, answered: _Answered) -> Sample:
        heard = answered.heard
        verdict = self.judge.verdict(answered.index, heard) if heard is not None else Verdict()
        return Sample(
            question=self.questions[answered.index].name,
            client=answered.client,
            due=answered.due,
            sent=answered.sent,
            done=answered.done,
            status=answered.status,
            error=answered.error,
            retry_after_s=answered.retry_after_s,
            detections=verdict.detections,
            poses=verdict.poses,
            wrong=verdict.wrong,
            wrong_alone=verdict.wrong_alone,
            changed=verdict.changed,
            lost=verdict.lost,
            rejected=verdict.rejected,
            stage_ms=heard.stage_ms if heard is not None else {},
            batch_detections=heard.batch_detections if heard is not None else 0,
            batch_requests=heard.batch_requests if heard is not None else 0,
        )

    def run(
        self,
        mode: Literal["closed", "open"],
        part: _Measured,
        samples: list[Sample],
        *,
        clients: int,
        carried: Sequence[Sample] = (),
        rate_hz: float | None = None,
    ) -> Run:
        """Build the run's result."""
        return Run(
            mode=mode,
            clients=clients,
            rate_hz=rate_hz,
            begun=part.begun,
            ended=part.ended,
            samples=samples,
            carried=list(carried),
            usage=part.observed.usage,
            gpus=part.observed.gpus,
            metrics=part.observed.metrics,
            load_generator_cpu_s=part.observed.own_cpu_s,
            wrong_alone=self.judge.wrong_alone,
            wrong_alone_share=self.judge.wrong_alone_share,
        )
