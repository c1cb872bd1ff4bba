"""The list: every check in its order, with its share of the nine minutes."""

from students.shapes import CATALOG
from tests.gpu import bench, copies, engine, exact, job, machine, operators, speed, waits
from tests.gpu.runner import Check

CHECKS = (
    Check("versions", 2, machine.versions),
    Check("doctor", 20, machine.doctor, uses_device=False),
    Check("tests marked gpu", 90, machine.gpu_tests, uses_device=False),
    Check("operators against the CPU", 20, operators.compare),
    Check("batches copied", 2, copies.of_batches),
    Check("stopwatch", 2, waits.stopwatch),
    Check("same bits twice", 15, exact.same_bits_twice),
    Check("engine fp32", 25, engine.stages("fp32")),
    Check("engine bf16", 15, engine.stages("bf16")),
    Check("job stopped, killed, resumed", 60, job.stopped_killed_resumed),
    Check("job with a student out of memory", 15, job.out_of_memory),
    Check("two ranks", 0, machine.two_ranks, uses_device=False),
    Check("matrix product", 3, speed.matmul),
    Check("teacher, eager", 35, speed.teacher_eager),
    Check("teacher, compiled", 80, speed.teacher_compiled),
    *(Check(f"student {name}", 8, speed.student(name)) for name in CATALOG),
    Check("loss and Sinkhorn", 10, speed.losses),
    Check("memory against the plan", 35, bench.memory),
    Check("bench and waits", 25, bench.steps),
)
