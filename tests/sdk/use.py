"""What somebody does with the client that was generated from openapi.yaml: a run, many runs, a sandbox, a refusal. Any mistake ends it."""

import os

from mayfly_client import AuthenticatedClient
from mayfly_client.api.runs import create_run, create_runs, read_run, read_runs
from mayfly_client.api.sandboxes import create_sandbox, delete_sandbox, read_sandbox
from mayfly_client.models.batch_request import BatchRequest
from mayfly_client.models.problem import Problem
from mayfly_client.models.problem_code import ProblemCode
from mayfly_client.models.reason import Reason
from mayfly_client.models.requested_limits import RequestedLimits
from mayfly_client.models.run import Run
from mayfly_client.models.run_request import RunRequest
from mayfly_client.models.sandbox import Sandbox
from mayfly_client.models.sandbox_request import SandboxRequest
from mayfly_client.models.state import State

client = AuthenticatedClient(
    base_url=os.environ["MAYFLY_URL"], token=os.environ["MAYFLY_TOKEN"], timeout=60.0, httpx_args={"trust_env": False}
)


def is_(what, kind):
    assert isinstance(what, kind), what
    return what


def shell(script, **more):
    return RunRequest(image="busybox", command=["sh", "-c", script], **more)


run = is_(create_run.sync(client=client, body=shell("read line; echo $line; exit 3", stdin="hello\n")), Run)
assert (run.state, run.stdout, run.outcome.reason, run.outcome.exit_code) == (State.EXITED, "hello\n", Reason.EXITED, 3), run
assert is_(read_run.sync(str(run.id), client=client), Run) == run
print("a run")

late = is_(create_run.sync(client=client, body=shell("sleep 1000", limits=RequestedLimits(wall_ms=500))), Run)
assert late.outcome.reason == Reason.WALL_TIMEOUT and late.outcome.usage.wall_ms >= 500, late
print("a limit")

batch = create_runs.sync(client=client, body=BatchRequest(runs=[shell("echo one"), RunRequest(image="no-such-image"), shell("echo three")]))
one, refused, three = batch.items
assert one.run and three.run, batch
assert (is_(one.run, Run).stdout, is_(three.run, Run).stdout) == ("one\n", "three\n"), batch
assert is_(refused.problem, Problem).code == ProblemCode.IMAGE_NOT_FOUND, batch
assert read_runs.sync(client=client, ids=[three.run.id, one.run.id]).items == [three, one]
print("a batch")

sandbox = is_(create_sandbox.sync(client=client, body=SandboxRequest(image="busybox", name="generated", command=["sleep", "1000"])), Sandbox)
assert is_(read_sandbox.sync("generated", client=client), Sandbox).id == sandbox.id
assert delete_sandbox.sync_detailed(str(sandbox.id), client=client).status_code == 204
gone = is_(read_sandbox.sync(str(sandbox.id), client=client), Problem)
assert (gone.code, gone.status) == (ProblemCode.NOT_FOUND, 404), gone
print("a sandbox")

wrong = is_(create_run.sync(client=client, body=shell("true", limits=RequestedLimits(pids=0))), Problem)
assert (wrong.code, wrong.field, wrong.bound.min_) == (ProblemCode.INVALID_REQUEST, "limits.pids", 1), wrong
print("a problem")
