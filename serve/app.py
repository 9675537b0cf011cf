"""The pipeline on one screen: every stage, its processes, its batch.

Mosec runs it behind the gateway, on loopback only. Its routes are not the public ones (serve/gateway/routes.py), which
call them through `Backend.call` (serve/backend/mosec.py):

    /pose     the queue (serve/scheduling/queue.py), once for each part of a pose request
    /finish   the task (serve/tasks/pose/parts.py), for a request that was split and wants a picture or files
    /inspect  what comes into the CAD store (serve/objects/ingest.py)
    /onboard  what engines make of it (serve/objects/onboarding.py); each engine has such a route

    /pose            decode ──▶ pose ──▶ respond      detections and CAD in, poses out
    /finish                              respond      overlay and files of a request that was split
    /inspect         inspect                          is this mesh usable, in which unit, how healthy
    /onboard         onboard                          build the geometric engine's model of an object
    /onboard_sam6d   onboard_sam6d                    build the network's; one such route for each engine of this start

`python -m serve.app --path DIR --port N --address 127.0.0.1 --timeout MS --capacity N --max-request-size BYTES`, with
the settings in `PEM_STAGES` and, where it must not outlive its parent, the parent's pid in `PEM_PARENT_PID`.

Mosec stops the whole server when the last process of a stage dies. So each stage gets one process more than it needs,
its keeper: it sleeps, and is there while a worker that crashed is replaced (`workers/lifecycle.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from mosec import Runtime, Server, Worker
from mosec.runtime import RsRuntimeManager
from mosec.utils import get_mosec_path

from posekit import registry
from workers import settings
from workers.lifecycle import die_with_parent, slot_environment, starts_dir
from workers.stages import onboard
from workers.stages.decode import DecodeStage
from workers.stages.inspect_cad import InspectStage
from workers.stages.pose import PoseStage
from workers.stages.respond import RespondStage

PARENT = "PEM_PARENT_PID"
SHORTEST_WAIT_MS = 1  # a batch is gathered in the gateway, which knows whether anyone else is there
NEVER_S = 86_400.0  # Mosec's own limit on a batch answers all of it with 408: the gateway has deadlines instead


def build(stages: settings.Stages) -> Server:
    """The server with its routes over its stages."""
    server = Server()
    server._rs_runtime_manager = FrontThatDiesWithUs(server._configs["timeout"])

    decode = stage(DecodeStage, ["cpu"] * stages.decode.workers, threads=stages.decode.threads)
    pose = stage(
        PoseStage,
        list(stages.devices),
        threads=1,
        batch=stages.pose.batch_requests,
        wait_ms=SHORTEST_WAIT_MS,
    )
    respond = stage(RespondStage, ["cpu"] * stages.respond.workers, threads=1)
    inspect = stage(InspectStage, ["cpu"], threads=stages.onboard.threads)

    routes = {"/pose": [decode, pose, respond], "/finish": [respond], "/inspect": [inspect]}
    for engine in registry.by_effort():  # in an order that no setting changes: Mosec numbers its stages
        if engine.name in stages.engines:
            onboards = stage(onboard.STAGES[engine.name], ["cpu"], threads=stages.onboard.threads)
            routes[f"/{engine.onboard_stage}"] = [onboards]
    server.register_runtime(routes)
    return server


def stage(worker: type[Worker], devices: list[str], *, threads: int, batch: int = 1, wait_ms: int = 0) -> Runtime:
    """One process per device, and a keeper."""
    slots = [
        slot_environment(slot=slot, keeper=False, device=device, threads=threads) for slot, device in enumerate(devices)
    ]
    keeper = slot_environment(slot=len(devices), keeper=True, device="cpu", threads=1)
    return Runtime(
        worker, num=len(slots) + 1, max_batch_size=batch, max_wait_time=wait_ms, timeout=NEVER_S, env=[*slots, keeper]
    )


class FrontThatDiesWithUs(RsRuntimeManager):
    """Mosec's HTTP front, which would otherwise outlive a killed main process."""

    def start(self, config_path: Path) -> subprocess.Popen[bytes]:
        """Start it from this, the main, thread."""
        parent_pid = os.getpid()
        command = [str(get_mosec_path()), str(config_path)]
        self.process = subprocess.Popen(command, preexec_fn=lambda: die_with_parent(parent_pid))
        return self.process


def main() -> None:
    """Serve until SIGTERM."""
    if parent := os.environ.get(PARENT):
        die_with_parent(int(parent))
    stages = settings.from_environment()
    shutil.rmtree(starts_dir(Path(stages.run_dir)), ignore_errors=True)
    build(stages).run()


if __name__ == "__main__":
    main()
