"""The page that Prometheus reads: our families, and a real Mosec server's, cleaned."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pem.contract import Row, RowError, RowEvidence
from posekit.engine import REJECT_CODES
from serve.errors import CODES
from serve.gateway import routes
from serve.telemetry.metrics import CONTENT_TYPE, Metrics, mosec_families
from workers.messages import PartAnswer, PassRecord
from workers.state import WorkerState

POSE_ROUTES = ["/api/v1/pose_estimation", "/api/v1/full_pipeline", "/api/v1/pose-estimation"]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

OURS = {
    "pose_requests",
    "pose_detections",
    "pose_rejected",
    "pose_request_duration_seconds",
    "pose_stage_duration_seconds",
    "pose_queue_wait_seconds",
    "pose_pass_detections",
    "pose_pass_requests",
    "pose_pass_dispatch",
    "pose_device_busy_seconds",
    "pose_device_memory_bytes",
    "pose_queue_detections",
    "pose_score",
    "pose_residual_mm",
    "pose_object_cache_hits",
    "pose_object_cache_misses",
    "pose_object_cache_bytes",
    "pose_model_info",
    "pose_kernel_info",
    "pose_ready",
    "pose_degraded",
    "pose_draining",
    "pose_workers",
    "pose_worker_restarts",
    "pose_process_cpu_seconds",
    "pose_process_resident_bytes",
}
MOSECS = {
    "mosec_service_throughput",
    "mosec_service_process_duration_second",
    "mosec_service_batch_size",
    "mosec_service_batch_duration_second",
    "mosec_service_remaining_task",
}

TWO_STAGES = """
from mosec import Runtime, Server, ValidationError, Worker


class First(Worker):
    def forward(self, data):
        if data == "bad":
            raise ValidationError("no")
        return data


class Second(Worker):
    def forward(self, data):
        return data


if __name__ == "__main__":
    server = Server()
    server.register_runtime({"/pose": [Runtime(First), Runtime(Second, num=2, max_batch_size=2, max_wait_time=1)]})
    server.run()
"""


def samples(page: bytes | str) -> Samples:
    text = page.decode() if isinstance(page, bytes) else page
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics.expose())[name, tuple(sorted(labels.items()))]


def families(page: bytes) -> set[str]:
    return {family.name for family in text_string_to_metric_families(page.decode())}


def solved(confidence: float = 0.9, cad_id: str = "abc") -> Row:
    evidence = RowEvidence(inlier_fraction=0.9, residual_mm=1.2, visible_overlap=0.8, free_space_violation=0.1)
    return Row(
        object_id=5,
        cad_id=cad_id,
        rotation=[[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        translation=[0, 0, 500],
        confidence=confidence,
        bbox=(0, 0, 9, 9),
        status="ok",
        evidence=evidence,
    )


def rejected(code: str) -> Row:
    return Row(
        object_id=5,
        cad_id="abc",
        rotation=None,
        translation=None,
        confidence=0,
        bbox=(0, 0, 9, 9),
        status="rejected",
        error=RowError(code=code, detail="because"),
    )


def promtool_says(page: bytes) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus)")
    done = subprocess.run([tool, "check", "metrics"], input=page, capture_output=True, timeout=30, check=False)
    return (done.stdout + done.stderr).decode() if done.returncode or done.stderr else ""


@pytest.fixture(scope="module")
def mosec_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return Mosec's page after a handful of requests, one of them refused, over three connections of its workers."""
    folder = tmp_path_factory.mktemp("two_stages")
    script = folder / "two_stages.py"
    script.write_text(TWO_STAGES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(script),
        "--address",
        "127.0.0.1",
        "--port",
        str(port),
        "--path",
        str(folder / "ipc"),
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            base = f"http://127.0.0.1:{port}"
            _wait_until_up(base, server)
            for body in (b"1", b"2", b"3", b"4", b'"bad"'):
                _post(base + "/pose", body)
            with urllib.request.urlopen(base + "/metrics", timeout=5) as answer:
                yield answer.read().decode()
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(5)


def _wait_until_up(base: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(900):
        assert server.poll() is None
        try:
            urllib.request.urlopen(base + "/", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("the two-stage server did not start")


def _post(url: str, body: bytes) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=5) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code


# ------------------------------------------------------------------------------------------------------------ the page


def test_every_family_is_there_from_the_start() -> None:
    assert families(Metrics().expose()) == OURS


def test_every_counter_starts_at_zero_where_its_labels_are_known() -> None:
    page = samples(Metrics(routes=routes.counted()).expose())
    labelled = [route for route in routes.ROUTES if route.path != "/"]
    for route in labelled:
        assert page["pose_requests_total", (("code", "200"), ("route", route.path))] == 0
    assert [route.path for route in labelled if route.timed] == POSE_ROUTES
    for path in POSE_ROUTES:
        for status, _ in CODES.values():
            assert page["pose_requests_total", (("code", str(status)), ("route", path))] == 0
    for reason in REJECT_CODES:
        assert page["pose_rejected_total", (("reason", reason),)] == 0
    for name in ("pose_object_cache_hits_total", "pose_object_cache_misses_total", "pose_worker_restarts_total"):
        assert page[name, ()] == 0


def test_our_page_alone_pleases_promtool() -> None:
    assert promtool_says(_used().expose()) == ""


def test_the_merged_page_pleases_promtool(mosec_text: str) -> None:
    assert promtool_says(_used().expose(mosec_text)) == ""


def test_the_merged_page_has_all_families_each_declared_once(mosec_text: str) -> None:
    page = _used().expose(mosec_text)
    assert families(page) == OURS | MOSECS
    declared = [line.split()[2] for line in page.decode().splitlines() if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared)) == len(OURS | MOSECS)
    assert "mosec_service_throughput_total" in declared
    assert b"# EOF" not in page
    assert b"connection=" not in page
    assert b"_created" not in page


def test_mosecs_numbers_survive(mosec_text: str) -> None:
    page = samples(Metrics().expose(mosec_text))
    assert page["mosec_service_throughput_total", (("code", "200"), ("endpoint", "/pose"))] == 4
    assert page["mosec_service_throughput_total", (("code", "422"), ("endpoint", "/pose"))] == 1
    assert page["mosec_service_process_duration_second_count", (("stage", "Second_2"),)] == 4
    assert page["mosec_service_process_duration_second_count", (("stage", "total"),)] == 4
    assert page["mosec_service_remaining_task", ()] == 0


def test_a_stage_of_two_workers_is_the_sum_of_its_connections(mosec_text: str) -> None:
    raw = samples(mosec_text.replace("# EOF", ""))
    page = samples(Metrics().expose(mosec_text))
    over = {dict(labels)["connection"] for (_, labels) in raw if dict(labels).get("stage") == "Second_2"}
    assert len(over) >= 1
    for (name, labels), total in page.items():
        if name.startswith("mosec_service_process"):
            parts = [v for (n, ls), v in raw.items() if n == name and _without_connection(ls) == labels]
            assert total == pytest.approx(sum(parts))


def _without_connection(labels: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in labels if pair[0] != "connection")


TWO_CONNECTIONS = """\
# HELP mosec_service_batch_size batch size for each connection in each stage.
# TYPE mosec_service_batch_size histogram
mosec_service_batch_size_sum{stage="Pose_2",connection="1"} 7.5
mosec_service_batch_size_count{stage="Pose_2",connection="1"} 3
mosec_service_batch_size_bucket{le="1.0",stage="Pose_2",connection="1"} 1
mosec_service_batch_size_bucket{le="16.0",stage="Pose_2",connection="1"} 3
mosec_service_batch_size_bucket{le="2.0",stage="Pose_2",connection="1"} 2
mosec_service_batch_size_bucket{le="+Inf",stage="Pose_2",connection="1"} 3
mosec_service_batch_size_sum{stage="Pose_2",connection="2"} 2.5
mosec_service_batch_size_count{stage="Pose_2",connection="2"} 2
mosec_service_batch_size_bucket{le="1.0",stage="Pose_2",connection="2"} 1
mosec_service_batch_size_bucket{le="16.0",stage="Pose_2",connection="2"} 2
mosec_service_batch_size_bucket{le="2.0",stage="Pose_2",connection="2"} 2
mosec_service_batch_size_bucket{le="+Inf",stage="Pose_2",connection="2"} 2
# HELP mosec_service_throughput service inference endpoint throughput.
# TYPE mosec_service_throughput counter
mosec_service_throughput_total{code="200",endpoint="/pose"} 5
# EOF
"""


def test_series_of_two_connections_become_one_with_its_buckets_in_order() -> None:
    (batch_size, _) = mosec_families(TWO_CONNECTIONS)
    got = [(s.name.removeprefix("mosec_service_batch_size"), s.labels.get("le"), s.value) for s in batch_size.samples]
    assert got == [
        ("_bucket", "1.0", 2),
        ("_bucket", "2.0", 4),
        ("_bucket", "16.0", 5),
        ("_bucket", "+Inf", 5),
        ("_count", None, 5),
        ("_sum", None, 10),
    ]
    assert all("connection" not in sample.labels for sample in batch_size.samples)
    assert promtool_says(Metrics().expose(TWO_CONNECTIONS)) == ""


def test_a_thousand_restarts_do_not_make_the_page_slow() -> None:
    bounds = [str(float(2**power)) for power in range(20)] + ["+Inf"]
    lines = [
        f'mosec_service_batch_size_bucket{{le="{bound}",stage="Pose_2",connection="{connection}"}} 1'
        for connection in range(1000)
        for bound in bounds
    ]
    text = "\n".join(["# TYPE mosec_service_batch_size histogram", *lines, "# EOF"])
    begun = time.process_time()
    (family,) = mosec_families(text)
    assert time.process_time() - begun < 0.2  # of 21 000 lines; 0.04 seen, ten times that where each is parsed
    assert [sample.value for sample in family.samples] == [1000.0] * len(bounds)


@pytest.mark.parametrize("text", [None, "", "<html>", "a{b 1", "mosec_service_batch_size{", "x" * 1000, "\0"])
def test_without_a_page_from_mosec_ours_stands_alone(text: str | None) -> None:
    assert families(Metrics().expose(text)) == OURS


def test_the_content_type_is_the_text_format_that_prometheus_reads() -> None:
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


# -------------------------------------------------------------------------------------------------------- the methods


def _used() -> Metrics:
    metrics = Metrics(["mug"])
    metrics.request("/api/v1/pose_estimation", 200, 0.2)
    metrics.part(
        PartAnswer(
            part_id="p",
            rows=[solved(), solved(0.4, "xyz"), rejected("no_fit")],
            engine="geometric",
            decode_ms=10,
            queue_ms=20,
            pose_ms=100,
            respond_ms=1,
            passes=[PassRecord(engine="geometric", detections=12, requests=3, seconds=0.1)],
        ),
        {"abc": "mug", "xyz": "secret part"}.get,
        waited_s=0.5,
    )
    metrics.model(engine="geometric", release="r1", sha256="", track="production")
    metrics.kernels({"furthest_point_sample": "compiled"})
    metrics.queue(7)
    return metrics


def test_a_part_counts_its_rows_stages_waiting_and_passes() -> None:
    page = samples(_used().expose())
    assert page["pose_detections_total", (("engine", "geometric"), ("status", "ok"))] == 2
    assert page["pose_detections_total", (("engine", "geometric"), ("status", "rejected"))] == 1
    assert page["pose_rejected_total", (("reason", "no_fit"),)] == 1
    assert page["pose_queue_wait_seconds_sum", ()] == pytest.approx(0.52)
    assert page["pose_stage_duration_seconds_sum", (("stage", "pose"),)] == pytest.approx(0.1)
    assert page["pose_stage_duration_seconds_sum", (("stage", "decode"),)] == pytest.approx(0.01)
    assert page["pose_pass_detections_sum", ()] == 12
    assert page["pose_pass_requests_sum", ()] == 3
    assert page["pose_queue_detections", ()] == 7


def test_only_names_on_the_list_become_labels() -> None:
    page = samples(_used().expose())
    assert page["pose_score_sum", (("object", "mug"),)] == pytest.approx(0.9)
    assert page["pose_score_sum", (("object", "other"),)] == pytest.approx(0.4)
    assert page["pose_residual_mm_count", (("object", "other"),)] == 1
    assert b"secret part" not in _used().expose()


def test_the_answer_of_finish_counts_only_its_own_work() -> None:
    metrics = Metrics()
    metrics.part(PartAnswer(part_id="p", respond_ms=30), lambda _: None)
    assert value(metrics, "pose_stage_duration_seconds_count", stage="respond") == 1
    assert value(metrics, "pose_stage_duration_seconds_count", stage="pose") == 0
    assert value(metrics, "pose_queue_wait_seconds_count") == 0


def test_refusals_and_probes_do_not_shorten_the_request_duration() -> None:
    metrics = Metrics()
    metrics.request("/livez", 200)
    for code in (429, 422):
        metrics.request("/api/v1/pose_estimation", code, 0.001)
    assert value(metrics, "pose_request_duration_seconds_count") == 0
    metrics.request("/api/v1/full_pipeline", 504, 30.0)
    assert value(metrics, "pose_request_duration_seconds_sum") == 30


def test_cache_counters_only_grow_when_a_worker_starts_again() -> None:
    metrics = Metrics()
    metrics.cache(7, hits=10, misses=2, cached_bytes=100)
    metrics.cache(7, hits=15, misses=2, cached_bytes=120)
    metrics.cache(8, hits=1, misses=1, cached_bytes=50)
    assert value(metrics, "pose_object_cache_hits_total") == 16
    assert value(metrics, "pose_object_cache_bytes") == 170
    metrics.worker_gone(7)
    assert value(metrics, "pose_object_cache_bytes") == 50
    metrics.cache(7, hits=3, misses=1, cached_bytes=10)  # a new worker, by chance under the old pid
    metrics.cache(8, hits=0, misses=1, cached_bytes=0)  # restarted before anyone noticed
    assert value(metrics, "pose_object_cache_hits_total") == 19
    assert value(metrics, "pose_object_cache_misses_total") == 5
    assert value(metrics, "pose_object_cache_bytes") == 10


def test_passes_count_for_the_device_that_ran_them() -> None:
    metrics = Metrics()
    metrics.devices(["cuda:0", "cuda:1"], [])
    assert value(metrics, "pose_device_busy_seconds_total", device="cuda:1") == 0
    passes = [
        PassRecord(engine="geometric", detections=1, requests=1, seconds=seconds, device=device)
        for seconds, device in ((0.25, "cuda:0"), (0.5, "cuda:1"), (0.25, "cuda:0"))
    ]
    metrics.part(PartAnswer(part_id="p", engine="geometric", passes=passes), lambda _: None)
    assert value(metrics, "pose_device_busy_seconds_total", device="cuda:0") == 0.5
    assert value(metrics, "pose_device_busy_seconds_total", device="cuda:1") == 0.5


def pose_worker(slot: int, **info: object) -> WorkerState:
    return WorkerState(stage="pose", slot=slot, pid=1000 + slot, started_unix=0.0, ready=True, info=info)


def test_memory_of_a_device_is_that_of_its_workers_under_the_servers_name_for_it() -> None:
    metrics = Metrics()
    names = ("cuda:0", "cuda:1", "cuda:1")
    memory = {"allocated": 10, "reserved": 20, "total": 100}
    workers = [pose_worker(0), *(pose_worker(slot, device="cuda:0", device_memory=memory) for slot in (1, 2, 7))]
    for _ in range(2):
        metrics.devices(names, workers)
    shown = {ls: v for (name, ls), v in samples(metrics.expose()).items() if name == "pose_device_memory_bytes"}
    wanted = {"allocated": 20, "reserved": 40, "total": 100}
    assert shown == {(("device", "cuda:1"), ("kind", kind)): size for kind, size in wanted.items()}
    metrics.devices(names, [])
    assert not any(name == "pose_device_memory_bytes" for name, _ in samples(metrics.expose()))


def test_a_stage_that_lost_its_workers_has_none_and_does_not_vanish() -> None:
    metrics = Metrics()
    metrics.worker_counts({"pose": 2, "decode": 1})
    metrics.worker_counts({"decode": 1})
    assert value(metrics, "pose_workers", stage="pose") == 0
    assert value(metrics, "pose_workers", stage="decode") == 1


def test_dispatches_are_counted_by_their_reason() -> None:
    metrics = Metrics()
    for reason in ("idle", "idle", "full", "a reason made up"):
        metrics.dispatched(reason)
    counted = {dict(ls)["reason"]: v for (name, ls), v in samples(metrics.expose()).items() if "dispatch" in name}
    assert counted == {"idle": 2, "full": 1, "window": 0, "other": 1}


def test_what_this_process_takes_is_the_gateways() -> None:
    metrics = Metrics()
    metrics.processes([])
    assert value(metrics, "pose_process_cpu_seconds_total", stage="gateway") > 0
    assert value(metrics, "pose_process_resident_bytes", stage="gateway") > 1e7
    assert value(metrics, "pose_process_resident_bytes", stage="onboard_sam6d") == 0


def test_a_new_model_replaces_the_one_on_its_track() -> None:
    metrics = Metrics()
    metrics.model(engine="geometric", release="r1", sha256="a")
    metrics.model(engine="sam6d", release="r2", sha256="b")
    metrics.model(engine="sam6d", release="r3", sha256="c", track="candidate")
    releases = {dict(labels)["release"] for (name, labels) in samples(metrics.expose()) if name == "pose_model_info"}
    assert releases == {"r2", "r3"}


def test_kernels_a_stand_in_draining_and_restarts_are_shown() -> None:
    metrics = Metrics()
    metrics.kernels({"ball_query": "compiled"})
    metrics.kernels({"ball_query": "reference"})
    metrics.draining(True)
    metrics.ready(True)
    metrics.degraded(True)
    metrics.restarted()
    metrics.rejected("a reason made up")
    page = samples(metrics.expose())
    assert [labels for (name, labels) in page if name == "pose_kernel_info"] == [
        (("kernel", "reference"), ("op", "ball_query"))
    ]
    assert page["pose_draining", ()] == 1
    assert page["pose_ready", ()] == 1
    assert page["pose_degraded", ()] == 1
    assert page["pose_worker_restarts_total", ()] == 1
    assert page["pose_rejected_total", (("reason", "other"),)] == 1
