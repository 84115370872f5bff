"""How failures of workers are reported to the driver."""

from __future__ import annotations

from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)

from cifar_dist.cluster.controller import summarize_failure


def test_those_that_died_are_named_and_not_those_that_noticed() -> None:
    died = WorkerHealthCheckFailedError("no answer", ActorDiedError())
    raised = RuntimeError("Connection closed by peer")

    def summary(error: Exception) -> str:
        return summarize_failure(error, died=WorkerHealthCheckFailedError)

    assert summary(WorkerGroupError("2", {0: raised, 1: died})) == "process of worker 1 died"
    assert summary(WorkerGroupError("2", {2: died, 0: died})) == "process of worker 0, 2 died"
    # As Ray has it: a traceback, whose last line is the error.
    own = UserExceptionWithTraceback(ValueError("no"), "Traceback ...\nValueError: no\n")
    assert summary(WorkerGroupError("1", {1: own})) == "worker 1 raised ValueError: no"
    both = {0: raised, 1: own}
    assert summary(WorkerGroupError("2", both)) == "worker 0, 1 raised ValueError: no"
    assert summary(WorkerGroupError("1", {1: raised})) == f"worker 1 raised {raised}"
    assert summary(ValueError("first\nsecond")) == "first"
