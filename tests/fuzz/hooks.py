"""What the fuzzer may not do to its own service, what it is to work on, and what JSON Schema cannot say of a request. Nothing here hides an answer."""

import base64
import http.client
import itertools
import os
import sys
import zlib

import schemathesis
from schemathesis.core.parameters import ParameterLocation

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import live  # noqa: E402 it lies beside this file

# Nothing would be tried any more if the fuzzer changed its own quotas.
OWN_TENANT = os.environ["MAYFLY_FUZZ_TENANT"]
# Where it is noted what was answered, for tests/fuzz.rs.
CALLS = open(os.environ["MAYFLY_FUZZ_CALLS"], "a", buffering=1)
NUMBERS = itertools.count()
# Longer than the fuzzer works.
LONG_MS = 3_600_000
STREAMS = ("readLog", "readExecLog", "readStats", "listEvents")
# No image has the name of one of these.
IMAGE_ROUTES = ("import", "pull", "push", "tag", "verify")
ATTACH = ("attachSandbox", "attachExec")
# Where nothing changes, nothing comes: only a handshake is answered at once.
WATCH = "watchFiles"
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}

# What follows a handshake is no HTTP: the connection is not to be used for the next request, as Python would.
_is_closed_after = http.client.HTTPResponse._check_close
http.client.HTTPResponse._check_close = lambda response: response.status == 101 or _is_closed_after(response)


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
    if operation in ("adminChangeTenant", "adminChangePrincipal", "adminSuspendTenant") and path.get("tenant") == OWN_TENANT:
        path["tenant"] = "another"
    if operation == "deleteImage" and path.get("reference") == live.IMAGE:
        path["reference"] = "another"
    # How long to wait is the caller's choice; a fuzzer's time is short.
    if operation == "waitForSandbox" and str((case.query or {}).get("timeout_ms", 0)).isdigit():
        case.query = {**(case.query or {}), "timeout_ms": "50"}
    if operation == "stopSandbox" and is_valid and isinstance(case.body, dict):
        case.body["grace_ms"] = 50
    if operation == "adminDrainNode" and isinstance(case.body, dict) and isinstance(case.body.get("evict_after_ms"), int):
        case.body["evict_after_ms"] = LONG_MS
    # Which URLs are a target is beyond JSON Schema: ports, addresses, what an operator allows. This one leads nowhere (RFC 2606).
    if operation in ("createWebhook", "changeWebhook") and is_valid and isinstance(case.body, dict) and "url" in case.body:
        case.body["url"] = "https://hooks.example/in"
    # What is where, and which registries are asked, JSON Schema does not say. Those of bad requests stay as they are: the service refuses all registries but one.
    if operation == "pullImage" and is_valid and isinstance(case.body, dict) and "reference" in case.body:
        case.body["reference"] = live.PULLED
        # The name of a route, and that of the image that all sandboxes are made of.
        if case.body.get("name") in (*IMAGE_ROUTES, live.IMAGE):
            case.body["name"] = "another"
    if operation in ("tagImage", "pushImage", "verifyImage") and is_valid and isinstance(case.body, dict) and "reference" in case.body:
        case.body["reference"] = live.IMAGE
        if operation == "tagImage" and case.body.get("name") in (*IMAGE_ROUTES, live.IMAGE):
            case.body["name"] = "another"
        if operation == "pushImage":
            case.body["to"] = live.PULLED.replace("/app:", "/pushed:")
    # Which names are those of hosts, and with which ports, is beyond JSON Schema.
    if operation == "keepRegistryLogin" and is_valid and isinstance(case.body, dict) and "registry" in case.body:
        case.body["registry"] = "registry.example"
    # Exactly one of the two, which JSON Schema cannot say of parameters.
    if operation == "changeFile" and is_valid:
        case.query = {**{name: value for name, value in (case.query or {}).items() if name not in ("rename", "exclusive")}, "mkdir": "true"}
    # The files of a sandbox under gVisor cannot be worked on, whatever the request; those of a run nobody asks for.
    if operation == "createSandbox" and is_valid and isinstance(case.body, dict) and case.body.get("isolation") == "gvisor":
        case.body["isolation"] = "container"
    if operation in ("createRun", "createSandbox") and isinstance(case.body, dict):
        if operation == "createSandbox" and is_valid:
            # That one of the two is needed, and not both, is beyond JSON Schema.
            case.body.pop("pool", None)
            case.body.setdefault("image", live.IMAGE)
        creation(case.body, operation, is_valid)
    if operation in ("createPool", "changePool") and is_valid and isinstance(case.body, dict) and isinstance(case.body.get("size"), int):
        # What others do has room beside it.
        case.body["size"] = min(case.body["size"], int(operation == "changePool"))
    if operation == "createPool" and is_valid and isinstance(case.body, dict):
        creation(case.body["template"], operation, is_valid)
        if case.body["template"].get("output_policy") == "discard":
            case.body.pop("ready_output", None)
    if operation == "createRuns" and isinstance(case.body, dict):
        batch(case.body, is_valid)
    if operation == "changeSandbox" and is_valid and isinstance(case.body, dict) and isinstance(case.body.get("limits"), dict):
        at_hand(case.body["limits"])
    # Its space is set aside where all tests work.
    if operation == "createVolume" and is_valid and isinstance(case.body, dict) and isinstance(case.body.get("size_bytes"), int):
        case.body["size_bytes"] = min(case.body["size_bytes"], 16 << 20)
    # Images of one name take each other's place, and leave room to others.
    if operation == "commitSandbox" and is_valid and isinstance(case.body, dict):
        case.body["reference"] = "committed"
    if operation == "createExec" and is_valid and isinstance(case.body, dict):
        case.body["wait_ms"] = 50
        # Input that is given at once is not kept open, and is no terminal.
        if case.body.get("stdin") is not None:
            case.body.pop("stdin_open", None)
            case.body.pop("tty", None)
        as_told(case.body, "stdin", "stdin_encoding")
    has_end = work_on_what_there_is(case, operation, path, is_valid, kwargs)
    # Without which header it is refused is tried by itself.
    if case.meta is not None and case.meta.is_negative_at(ParameterLocation.HEADER):
        # One that is not refused for it is answered in the form that its headers ask for, and that may have no end.
        if operation in STREAMS:
            case.query = {**(case.query or {}), "stream" if operation == "readStats" else "follow": "false"}
        # This has none.
        if operation == WATCH:
            case.query = {**(case.query or {}), "path": "/nowhere"}
        return
    # A key of its own: with another's, nothing but that is told.
    if "Idempotency-Key" in (case.headers or {}):
        case.headers = {**case.headers, "Idempotency-Key": f"case-{next(NUMBERS)}"}
    if operation in STREAMS:
        stream(case, operation, is_valid, has_end)
    if operation == WATCH or operation in ATTACH and is_valid:
        case.headers = {**(case.headers or {}), **HANDSHAKE}


@schemathesis.hook
def after_call(context, case, response):
    if case.method.upper() != case.operation.method.upper():
        return
    operation = case.operation.definition.raw.get("operationId")
    CALLS.write(f"{operation} {response.status_code}\n")
    # A drained node starts nothing any more: the rest of the cases would try nothing.
    if operation == "adminDrainNode" and response.status_code == 200:
        live.made("POST", f"/v1/admin/nodes/{case.path_parameters['node']}/resume", [200], {})


@schemathesis.check
def code_is_told(context, response, case):
    """A refusal has one of the codes that its operation tells of for this status, each by an example."""
    if case.method.upper() != case.operation.method.upper() or not response.headers.get("content-type", [""])[0].startswith("application/problem+json"):
        return
    document = case.operation.schema.raw_schema
    answer = case.operation.definition.raw["responses"].get(str(response.status_code), {})
    if "$ref" in answer:
        answer = document["components"]["responses"][answer["$ref"].rsplit("/", 1)[-1]]
    if "content" not in answer:
        # That the status is none of its own is found by another check.
        return
    names = [example["$ref"].rsplit("/", 1)[-1] for example in answer["content"]["application/problem+json"]["examples"].values()]
    codes = {document["components"]["examples"][name]["value"]["code"] for name in names}
    code = response.json()["code"]
    assert code in codes, f"the code {code} of a {response.status_code} is none of {sorted(codes)}"


@schemathesis.serializer("application/x-tar")
def tar(context, value):
    return value if isinstance(value, bytes) else str(value).encode()


def draw(case):
    """A number that is the same for the same case: what is found is found again."""
    return zlib.crc32(repr((case.path, case.method, case.path_parameters, case.query, case.body)).encode(errors="replace"))


def work_on_what_there_is(case, operation, path, is_valid, kwargs):
    """Has half of the cases name what is there, unless a bad name is what makes the case a bad one. Whether a log of that has an end."""
    number = draw(case)
    is_path_valid = case.meta is None or not case.meta.is_negative_at(ParameterLocation.PATH)
    # Where one step follows another, it names what the one before made.
    is_by_itself = case.meta is None or case.meta.phase.name.value != "stateful"
    if number % 2 or not is_path_valid or not is_by_itself:
        # It may name a sandbox all the same: names are given by requests.
        return False
    number //= 2
    template = case.operation.path
    if template.startswith("/v1/sandboxes/{id}"):
        return in_a_sandbox(case, operation, path, is_valid, number, kwargs)
    if template.startswith("/v1/runs/{id}"):
        path["id"] = live.run("running" if operation == "cancelRun" or number % 4 == 0 else "exited")
    elif operation == "readRuns" and is_valid:
        case.query = {"ids": [live.run("exited"), live.run("running")]}
    elif template.startswith("/v1/webhooks/{id}"):
        path["id"] = live.webhook()
        if "delivery" in path:
            path["delivery"] = live.delivery(path["id"])
    elif template.startswith("/v1/admin/tenants/{tenant}"):
        path["tenant"] = live.OTHER_TENANT
        if "principal" in path:
            path["principal"] = "tester"
    elif template.startswith("/v1/admin/nodes/{node}"):
        path["node"] = live.NODE
    elif template == "/v1/volumes/{name}":
        path["name"] = live.volume()
    elif template == "/v1/pools/{name}":
        path["name"] = live.pool()
    elif template == "/v1/registries/{registry}":
        path["registry"] = live.registry()
    elif template in ("/v1/images/{reference}", "/v1/image-history/{reference}", "/v1/image-archives/{reference}"):
        path["reference"] = live.image()
    elif operation == "importImage" and is_valid:
        kwargs["data"] = live.IMAGE_ARCHIVE
    return True


def in_a_sandbox(case, operation, path, is_valid, number, kwargs):
    """A sandbox in the state that the operation is for, or now and then in another; and what is in it."""
    meant = {"startSandbox": "exited", "resumeSandbox": "paused"}.get(operation, "running")
    others = [state for state in ("running", "exited", "paused") if state != meant]
    # Sandboxes have execs only while they run.
    state = others[number // 8 % 2] if number % 8 == 0 and "eid" not in path else meant
    path["id"] = live.sandbox(state)
    if "eid" in path:
        state = "running" if operation in ("killExec", "resizeExec", "attachExec") or number % 2 else "exited"
        path["eid"] = live.process(path["id"], state)
    if "path" in path and state == "running":
        path["path"] = file_for(case, operation, path["id"], is_valid, number)
    if operation in ("readArchive", "writeArchive", WATCH) and is_valid:
        case.query = {**(case.query or {}), "path": "/tmp"}
    if operation == "writeArchive" and is_valid:
        kwargs["data"] = live.archive()
    return state == "exited"


def file_for(case, operation, sandbox, is_valid, number):
    """A path that there is, or where a new one can be."""
    if operation == "changeFile" and is_valid:
        if number % 3:
            return f"tmp/new-{number}"
        case.query = {"rename": f"/tmp/renamed-{number}"}
    if operation == "readFile" and number % 3 == 0 and is_valid:
        case.query = {name: value for name, value in (case.query or {}).items() if name in ("limit",)} | {"list": "true"}
        return "tmp"
    return live.file(sandbox)


def stream(case, operation, is_valid, has_end):
    """Asks for it in one of its forms. What has no end is followed as events alone: those the fuzzer itself cuts short."""
    query = case.query or {}
    if not is_valid and operation == "listEvents":
        # A page.
        return
    forms = {"Accept": "application/x-ndjson"}, {"Accept": "text/event-stream"}, {"Accept": "text/plain"}, HANDSHAKE
    # A bad request is refused, or else ends.
    form = forms[draw(case) // 16 % 4] if is_valid else forms[1]
    if form.get("Accept") == "text/plain" and operation in ("readStats", "listEvents"):
        # One sample, a page.
        if query.get("stream") in (None, False, "false"):
            # Lines of JSON, which a case may ask for by itself, are a stream without an end.
            case.headers = {**{name: value for name, value in (case.headers or {}).items() if name.lower() != "accept"}, "Accept": "application/json"}
            return
        form = forms[1]
    # Where nothing comes that was asked for, a stream says nothing for long.
    is_narrow = bool(set(query) - {"follow", "timestamps", "interval_ms"}) or "Last-Event-ID" in (case.headers or {})
    # Whoever waits an hour for the second sample hears signs of life all the time, and so never gives up.
    if is_valid and str(query.get("interval_ms", "")).isdecimal():
        query["interval_ms"] = min(int(query["interval_ms"]), 500)
    if is_valid and operation == "readStats":
        query["stream"] = "false" if form is forms[0] else "true"
    elif is_valid and form is not HANDSHAKE and not has_end and (form is not forms[1] or is_narrow):
        query["follow"] = "false"
    if is_valid and operation == "listEvents":
        # Of a stream there are no pages, and what a cursor looks like is nobody's business.
        query.pop("limit", None)
        query["cursor"] = "oldest"
        if form is not HANDSHAKE and (form is forms[0] or is_narrow):
            query["follow"] = "false"
        case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != "last-event-id"}
    case.query = query
    case.headers = {**(case.headers or {}), **form}


def at_hand(limits):
    """Asks for no more than any machine has, and for a disk that leaves room to others: its space is set aside where all tests work."""
    for name, most in ("cpu_millis", 2000), ("memory_bytes", 1 << 30), ("disk_bytes", 64 << 20):
        if isinstance(limits.get(name), int):
            limits[name] = min(limits[name], most)


def as_told(body, content, encoding):
    """Has a text be base64 where it is said to be."""
    if isinstance(body.get(content), str) and body.get(encoding) == "base64":
        body[content] = base64.b64encode(body[content].encode(errors="surrogatepass")).decode()


def batch(body, is_valid):
    """Has many runs be a few that this machine can have. What one of them breaks is told in its place of a good answer, so that each may be begun."""
    runs = body.get("runs")
    if not isinstance(runs, list):
        return
    # More than may be stay too many.
    if len(runs) <= 100:
        del runs[4:]
    if is_valid:
        body["wait_ms"] = 500
    for run in runs:
        if not isinstance(run, dict):
            continue
        # That is said for all of them.
        run.pop("wait_ms", None)
        if is_valid:
            creation(run, "createRuns", is_valid)
        elif isinstance(run.setdefault("limits", {}), dict):
            at_hand(run["limits"])
            if isinstance(run["limits"].setdefault("wall_ms", 2000), int):
                run["limits"]["wall_ms"] = min(run["limits"]["wall_ms"], 2000)


def creation(body, operation, is_valid):
    """Has a sandbox be one that this machine can have, and that is not waited for."""
    if isinstance(body.get("image"), str) and len(body["image"]) % 4:
        body["image"] = live.IMAGE
    # No registry but one is asked, and of many runs none pulls.
    if is_valid and body.get("pull", "never") != "never":
        if operation == "createRuns" or "image" not in body:
            body.pop("pull")
        else:
            body["image"] = live.PULLED
    # Without an entry point a command is needed, where the image has none.
    if is_valid and body.get("entrypoint") == []:
        body.pop("entrypoint")
    # Which languages there are is the operator's choice, so no schema lists them.
    if is_valid and "language" in body:
        body["language"] = "bash"
    # Nor which of them are compiled; what a step leaves is not kept under gVisor.
    if is_valid and ("language" in body or body.get("isolation") == "gvisor"):
        body.pop("compile", None)
    # That volumes stand beside each other, and not under gVisor, is beyond JSON Schema.
    if is_valid and body.get("isolation") == "gvisor":
        body.pop("volumes", None)
    for number, mount in enumerate(body.get("volumes") or [] if is_valid else []):
        mount["path"] = f"/volume-{number}"
    for wait in ("wait_ms", "stop_grace_ms"):
        if is_valid and (wait in body or wait == "wait_ms" and operation == "createRun"):
            body[wait] = 500
    if not is_valid:
        return
    # A layer is kept neither of what is removed at its end nor under gVisor.
    if body.get("auto_remove") or body.get("isolation") == "gvisor":
        body.pop("keep_layer", None)
    # Each case has its own input, and output that is kept; without cases there is nothing to judge.
    if body.get("cases") is not None:
        body.pop("stdin", None)
        if body.get("output_policy") == "discard":
            body.pop("output_policy")
        # One after another takes its time.
        del body["cases"][3:]
    else:
        body.pop("comparison", None)
        body.pop("stop_at_failure", None)
    for case in body.get("cases") or []:
        as_told(case, "stdin", "stdin_encoding")
        as_told(case, "expected_stdout", "expected_stdout_encoding")
    as_told(body, "stdin", "stdin_encoding")
    # Input that is given at once is not kept open, and is no terminal.
    if body.get("stdin") is not None:
        body.pop("stdin_open", None)
        body.pop("tty", None)
    for file in body.get("files") or []:
        as_told(file, "content", "encoding")
    # What goes on for long keeps room from others.
    body.setdefault("limits", {}).setdefault("wall_ms", 2000)
    step = body.get("compile") or {}
    if body.get("compile") is not None and not step.get("command"):
        # With an image it is needed, with a language it may not be given.
        body["compile"] = step = {**step, "command": ["true"]}
    for limits in (body["limits"], step.get("limits") or {}):
        at_hand(limits)
        # Limits that bound each other: inodes on disk, and the memory that another kernel needs.
        limits.pop("inodes", None)
        if body.get("isolation") == "gvisor":
            limits.pop("memory_bytes", None)
