"""What there is in the tenant for a request to work on. It may end or remove what it is given: the next one is given another."""

import io
import os
import tarfile
import time

import requests

# What it says comes last: then its files are there.
PROGRAM = "mkdir -p /tmp/folder; echo text > /tmp/file; echo on; exec sleep 1000"
SMALL = {"memory_bytes": 16 << 20, "disk_bytes": 4 << 20, "cpu_millis": 50}
# Longer than anything takes to be made on a loaded machine.
PATIENCE_S = 30

IMAGE = "busybox"
# At the only registry that the service asks.
PULLED = os.environ["MAYFLY_FUZZ_PULLED"]
OTHER_TENANT = os.environ["MAYFLY_FUZZ_OTHER_TENANT"]
NODE = os.environ["MAYFLY_FUZZ_NODE"]
with open(os.environ["MAYFLY_FUZZ_ARCHIVE"], "rb") as file:
    IMAGE_ARCHIVE = file.read()

_session = requests.Session()
_session.trust_env = False
_session.headers["Authorization"] = f"Bearer {os.environ['MAYFLY_TOKEN']}"
_kept = {}


def ask(method, path, expected, body=None, data=None):
    """The answer's body, if the status is the expected one; `None` if it is another, which a maker may not find."""
    answer = _session.request(method, os.environ["MAYFLY_FUZZ_URL"] + path, json=body, data=data, timeout=PATIENCE_S)
    if answer.status_code not in expected:
        return None
    return answer.json() if answer.content else {}


def made(method, path, expected, body=None, data=None):
    """The same of what must succeed, if not at once: there may be no room yet."""
    ends_at = time.monotonic() + PATIENCE_S
    while (answer := ask(method, path, expected, body, data)) is None:
        if time.monotonic() > ends_at:
            raise RuntimeError(f"{method} {path} did not answer {expected} within {PATIENCE_S} s")
        time.sleep(0.1)
    return answer


def kept(kind, make, is_fit):
    """The one of this kind that there is, or another where that will not do any more."""
    if kind not in _kept or not is_fit(_kept[kind]):
        _kept[kind] = make()
    return _kept[kind]


def sandbox(state):
    """The id of one that is `running`, `paused` or `exited`."""

    def is_fit(name):
        # One that was started again ends soon.
        patience_ms = 2000 if state == "exited" else 0
        waited = ask("GET", f"/v1/sandboxes/{name}/wait?until={state}&timeout_ms={patience_ms}", [200])
        if waited is not None and waited["result"] == "reached":
            return True
        ask("DELETE", f"/v1/sandboxes/{name}", [204])
        return False

    def make():
        command = ["sh", "-c", "echo over" if state == "exited" else PROGRAM]
        asked = {"image": IMAGE, "command": command, "limits": SMALL, "stdin_open": True, "keep_layer": state == "exited"}
        name = made("POST", "/v1/sandboxes", [201], asked)["id"]
        made("GET", f"/v1/sandboxes/{name}/wait?until={'exited' if state == 'exited' else 'running'}&timeout_ms=20000", [200])
        if state == "paused":
            made("POST", f"/v1/sandboxes/{name}/pause", [200], {})
        return name

    return kept(state, make, is_fit)


def process(of, state):
    """The id of an exec of the sandbox `of` that is `running`, with a terminal, or `exited`."""

    def is_fit(name):
        found = ask("GET", f"/v1/sandboxes/{of}/execs/{name}", [200])
        return found is not None and found["state"] == state

    def make():
        if state == "exited":
            return made("POST", f"/v1/sandboxes/{of}/execs", [200], {"command": ["echo", "over"]})["id"]
        return made("POST", f"/v1/sandboxes/{of}/execs", [202], {"command": ["sh", "-c", "echo on; exec sleep 1000"], "tty": True, "wait_ms": 0})["id"]

    return kept((of, state), make, is_fit)


def file(of):
    """The path of a file in the sandbox `of`."""
    made("PUT", f"/v1/sandboxes/{of}/files/tmp/file", [200], data=b"text\n")
    return "tmp/file"


def run(state):
    """The id of a run that is `running` or `exited`."""

    def is_fit(name):
        found = ask("GET", f"/v1/runs/{name}", [200])
        return found is not None and found["state"] == state

    def make():
        asked = {"image": IMAGE, "command": ["sleep", "1000"], "limits": {**SMALL, "wall_ms": 60000}, "wait_ms": 0}
        if state == "exited":
            asked.update({"command": ["true"], "wait_ms": 20000})
        return made("POST", "/v1/runs", [200 if state == "exited" else 202], asked)["id"]

    return kept(("run", state), make, is_fit)


def webhook():
    """The id of one that is active, and that leads nowhere (RFC 2606)."""

    def is_fit(name):
        found = ask("GET", f"/v1/webhooks/{name}", [200])
        return found is not None and found["active"]

    return kept("webhook", lambda: made("POST", "/v1/webhooks", [201], {"url": "https://hooks.example/in", "kinds": ["image.*"]})["id"], is_fit)


def delivery(of):
    """The id of one of the webhook `of`."""
    is_fit = lambda name: ask("GET", f"/v1/webhooks/{of}/deliveries/{name}", [200]) is not None
    return kept((of, "delivery"), lambda: made("POST", f"/v1/webhooks/{of}/test", [202], {})["id"], is_fit)


def image():
    """A reference of an image that nothing else needs."""
    is_fit = lambda reference: ask("GET", f"/v1/images/{reference}", [200]) is not None
    return kept("image", lambda: made("POST", "/v1/images/import?reference=fuzzed", [201], data=IMAGE_ARCHIVE)["reference"], is_fit)


def registry():
    """The name of one that credentials are kept for, and that is nowhere (RFC 2606)."""
    is_fit = lambda name: ask("GET", f"/v1/registries/{name}", [200]) is not None
    login = {"registry": "fuzzed.example", "username": "fuzzer", "password": "secret"}
    return kept("registry", lambda: made("POST", "/v1/registries", [201], login)["registry"], is_fit)


def volume():
    """The name of one."""
    is_fit = lambda name: ask("GET", f"/v1/volumes/{name}", [200]) is not None
    return kept("volume", lambda: made("POST", "/v1/volumes", [201], {"name": f"fuzzed-{time.monotonic_ns()}", "size_bytes": 4 << 20})["name"], is_fit)


def pool():
    """The name of one that keeps nothing."""
    is_fit = lambda name: ask("GET", f"/v1/pools/{name}", [200]) is not None
    request = {"name": f"fuzzed-{time.monotonic_ns()}", "size": 0, "template": {"image": IMAGE, "command": ["true"]}}
    return kept("pool", lambda: made("POST", "/v1/pools", [201], request)["name"], is_fit)


def archive():
    """A tar of a folder with a file in it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("packed/file")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"text\n"))
    return packed.getvalue()
