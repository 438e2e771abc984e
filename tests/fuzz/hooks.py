"""What the fuzzer may not do to its own service, and what JSON Schema cannot say of a request. Nothing here hides an answer."""

import os

import schemathesis

# A drained node starts nothing any more: the rest of the cases would try nothing.
NO_NODE = "0190b5a4-0000-7000-8000-000000000000"
# Nor would they if the fuzzer changed its own quotas.
OWN_TENANT = os.environ["MAYFLY_FUZZ_TENANT"]
# The only image that there is; without it no run would run.
IMAGE = "busybox"


@schemathesis.hook
def before_call(context, case, kwargs):
    operation = case.operation.definition.raw.get("operationId")
    is_valid = case.meta is None or case.meta.generation.mode.is_positive
    if case.query and is_valid:
        # Only a page gives a cursor; what it looks like is nobody's business.
        case.query.pop("cursor", None)
        # That the one lies before the other is beyond JSON Schema, and so is the calendar.
        if operation in ("readUsage", "adminReadUsage"):
            case.query.update({name: day for name, day in (("from", "2026-01-31"), ("to", "2026-02-01")) if name in case.query})
    path = case.path_parameters or {}
    if operation == "adminDrainNode" and "node" in path:
        path["node"] = NO_NODE
    if operation in ("adminChangeTenant", "adminChangePrincipal") and path.get("tenant") == OWN_TENANT:
        path["tenant"] = "another"
    if operation == "deleteImage" and path.get("reference") == IMAGE:
        path["reference"] = "another"
    # The log of what does not end has no end either.
    if operation == "readLog" and (case.query or {}).get("follow") in (None, True, "true"):
        case.query = {**(case.query or {}), "follow": "false"}
    # How long to wait is the caller's choice; a fuzzer's time is short.
    if operation == "waitForSandbox" and str((case.query or {}).get("timeout_ms", 0)).isdigit():
        case.query = {**(case.query or {}), "timeout_ms": "50"}
    if operation == "stopSandbox" and is_valid and isinstance(case.body, dict) and "grace_ms" in case.body:
        case.body["grace_ms"] = 50
    # Which URLs are a target is beyond JSON Schema: ports, addresses, what an operator allows. This one leads nowhere (RFC 2606).
    if operation in ("createWebhook", "changeWebhook") and is_valid and isinstance(case.body, dict) and "url" in case.body:
        case.body["url"] = "https://hooks.example/in"
    # Exactly one of the two, which JSON Schema cannot say of parameters.
    if operation == "changeFile" and is_valid:
        case.query = {**{name: value for name, value in (case.query or {}).items() if name not in ("rename", "exclusive")}, "mkdir": "true"}
    # The files of a sandbox under gVisor cannot be worked on, whatever the request; those of a run nobody asks for.
    if operation == "createSandbox" and is_valid and isinstance(case.body, dict) and case.body.get("isolation") == "gvisor":
        case.body["isolation"] = "container"
    if operation in ("createRun", "createSandbox") and isinstance(case.body, dict):
        creation(case.body, is_valid)


@schemathesis.serializer("application/x-tar")
def tar(context, value):
    return value if isinstance(value, bytes) else str(value).encode()


def creation(body, is_valid):
    """Has a sandbox be one that this machine can have, and that is not waited for."""
    if isinstance(body.get("image"), str) and len(body["image"]) % 4:
        body["image"] = IMAGE
    # Without an entry point a command is needed, where the image has none.
    if is_valid and body.get("entrypoint") == []:
        body.pop("entrypoint")
    # Which languages there are is the operator's choice, so no schema lists them.
    if is_valid and "language" in body:
        body["language"] = "bash"
        # Nor which of them are compiled.
        body.pop("compile", None)
    # What a compile step leaves is not kept there, whatever the step.
    if is_valid and body.get("isolation") == "gvisor":
        body.pop("compile", None)
    for wait in ("wait_ms", "stop_grace_ms"):
        if is_valid and wait in body:
            body[wait] = 50
    # That volumes stand beside each other, and not under gVisor, is beyond JSON Schema.
    if is_valid and body.get("isolation") == "gvisor":
        body.pop("volumes", None)
    for number, mount in enumerate(body.get("volumes") or [] if is_valid else []):
        mount["path"] = f"/volume-{number}"
    # Limits that bound each other: inodes on disk, and the memory that another kernel needs.
    limits = body.get("limits")
    if is_valid and isinstance(limits, dict):
        limits.pop("inodes", None)
        if body.get("isolation") == "gvisor":
            limits.pop("memory_bytes", None)
