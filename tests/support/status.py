"""What a run in the middle of its work writes about itself."""

from distill.runfolder.heartbeat import HeartbeatRecord
from distill.runfolder.metrics import MetricsRow
from distill.runfolder.status import CheckpointStatus, NetworkStatus, PhaseStatus, Status

ROW = MetricsRow(
    phase="base",
    step=10,
    time_unix=1000.0,
    loss=8.5,
    terms={"dino": 5.0, "ibot": 3.0, "koleo": 0.5},
    grad_norm=0.4,
    lr=2e-4,
    wait=0.1,
    images_per_s=150.0,
)


PHASES = (
    PhaseStatus("base", 300, 0.6, ("teacher",)),
    PhaseStatus("gram", 100, 0.1, ("teacher",)),
    PhaseStatus("family", 200, 0.3, ("small", "tiny")),
)


STATUS = Status(
    state="training",
    started_unix=1000.0,
    updated_unix=1010.0,
    phases=PHASES,
    networks={"small": NetworkStatus((0, 1), "training"), "tiny": NetworkStatus((1,), "waiting")},
    phase="family",
    step=20,
    phase_started_unix=1005.0,
    step_s=0.5,
    work_done=0.73,
    eta_s=90.0,
    last_checkpoint=CheckpointStatus("family", 10, "checkpoints/family-10", 1008.0),
)


LIMIT_S = 30.0


SIGN = HeartbeatRecord(
    world_rank=0,
    host="node1",
    pid=100,
    beat=1,
    phase="family",
    phase_number=1,
    phase_step=40,
    activity="learning",
    network="small",
    idle_s=0.0,
    allowed_s=LIMIT_S,
    is_waiting=False,
    frame="distill/train/student.py:90 in learn",
    end="",
)
