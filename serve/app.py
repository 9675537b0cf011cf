"""The pipeline on one screen: every stage, its processes, its batch.

Mosec runs it behind the gateway, on loopback only. Its routes are internal. The public routes
(serve/gateway/routes.py) call them through `Backend.call` (serve/backend/mosec.py):

    /pose     from the queue (serve/scheduling/queue.py), once for each part of a pose request
    /finish   from the task (serve/tasks/pose/parts.py), for a split request that wants a picture or files
    /inspect  from the CAD store (serve/objects/ingest.py), for each CAD that comes in
    /onboard  from the onboarding (serve/objects/onboarding.py); each engine has its own such route

    /pose            decode ──▶ pose ──▶ respond      detections and CAD in, poses out
    /finish                              respond      overlay and files of a split request
    /inspect         inspect                          is this mesh usable, in which unit, how healthy
    /onboard         onboard                          build the geometric engine's model of an object
    /onboard_sam6d   onboard_sam6d                    build the network's model; one such route per engine of this start

`python -m serve.app --path DIR --port N --address 127.0.0.1 --timeout MS --capacity N --max-request-size BYTES`, with
the settings in `PEM_STAGES`. `PEM_PARENT_PID` holds the pid of a parent that the server must not outlive.

Mosec stops the whole server when the last process of a stage dies. Each stage therefore gets one extra process, its
keeper, which sleeps and stays alive while a crashed worker is replaced (`workers/lifecycle.py`).
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
SHORTEST_WAIT_MS = 1  # the gateway gathers the batches: it knows whether other requests are waiting
NEVER_S = 86_400.0  # disables Mosec's limit, which would answer a whole batch with 408; the gateway has deadlines


def build(stages: settings.Stages) -> Server:
    """Build the server: its stages, and the routes over them."""
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
    for engine in registry.by_effort():  # a fixed order, whatever the settings: Mosec numbers its stages
        if engine.name in stages.engines:
            onboards = stage(onboard.STAGES[engine.name], ["cpu"], threads=stages.onboard.threads)
            routes[f"/{engine.onboard_stage}"] = [onboards]
    server.register_runtime(routes)
    return server


def stage(worker: type[Worker], devices: list[str], *, threads: int, batch: int = 1, wait_ms: int = 0) -> Runtime:
    """Describe a stage: one process per device, and a keeper."""
    slots = [
        slot_environment(slot=slot, keeper=False, device=device, threads=threads) for slot, device in enumerate(devices)
    ]
    keeper = slot_environment(slot=len(devices), keeper=True, device="cpu", threads=1)
    return Runtime(
        worker, num=len(slots) + 1, max_batch_size=batch, max_wait_time=wait_ms, timeout=NEVER_S, env=[*slots, keeper]
    )


class FrontThatDiesWithUs(RsRuntimeManager):
    """Mosec's HTTP front, made to die with the main process: it would otherwise outlive a killed one."""

    def start(self, config_path: Path) -> subprocess.Popen[bytes]:
        """Start the front. Must be called from the main thread."""
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
