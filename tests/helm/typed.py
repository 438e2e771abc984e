"""Stands in for helm and kubectl where the documents' commands are typed without a cluster: what they name must be what the chart makes, by Helm's own engine."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import helm_python.chart
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).parent.parent.parent
NAMESPACE = "mayfly"


def objects(values):
    with helm_python.chart.Chart.load(ROOT / "helm/mayfly") as chart:
        files = chart.render(values, name="mayfly", namespace=NAMESPACE)
    return [thing for name, text in files.items() if name.endswith(".yaml") for thing in yaml.safe_load_all(text) if thing]


def helm(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["upgrade"])
    parser.add_argument("release", choices=["mayfly"])
    parser.add_argument("chart", choices=["helm/mayfly"])
    parser.add_argument("--install", action="store_true", required=True)
    parser.add_argument("--namespace", choices=[NAMESPACE], required=True)
    parser.add_argument("--values", type=argparse.FileType())
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--timeout")
    asked = parser.parse_args(words)
    for thing in objects(yaml.safe_load(asked.values) or {}):
        if "monitoring.coreos.com" not in thing["apiVersion"]:
            kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)


def secrets(things):
    """Names of secrets that pods are given, each with the keys that are read of it."""
    found = {}
    for thing in things:
        pod = thing.get("spec", {}).get("template", {}).get("spec", {})
        by_volume = {volume["name"]: volume["secret"]["secretName"] for volume in pod.get("volumes", []) if "secret" in volume}
        for container in pod.get("containers", []):
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    found.setdefault(reference["name"], set()).add(reference["key"])
            for mount in container.get("volumeMounts", []):
                if mount["name"] in by_volume:
                    inside = [v["value"] for v in container["env"] if str(v.get("value", "")).startswith(mount["mountPath"] + "/")]
                    found.setdefault(by_volume[mount["name"]], set()).update(path.rsplit("/", 1)[1] for path in inside)
    return found


def kubectl(words):
    things = objects(yaml.safe_load(pathlib.Path("mayfly.yaml").read_text()))
    if words[:1] == ["--namespace"]:
        assert words[1] == NAMESPACE, words
        words = words[2:]
    match words:
        case ["create", "namespace", name] if name == NAMESPACE:
            pass
        case ["label", "namespace", name, "pod-security.kubernetes.io/enforce=privileged"] if name == NAMESPACE:
            pass
        case ["create", "secret", "generic", name, *sources]:
            given = {source.split("=", 1)[1].split("=")[0] for source in sources}
            wanted = secrets(things)[name]
            assert given == wanted, f"{name} has {given}, and {wanted} are read of it"
        case ["rollout", "status", target]:
            kind, name = target.split("/")
            assert any(thing["kind"].lower() == kind and thing["metadata"]["name"] == name for thing in things), target
        case ["exec", target, "--container", container, "--", *command]:
            kind, name = target.split("/")
            [pod] = [t["spec"]["template"]["spec"] for t in things if t["kind"].lower() == kind and t["metadata"]["name"] == name]
            assert container in [one["name"] for one in pod["containers"]], container
            # In the container it would be told where by its environment, as here.
            sys.exit(subprocess.run(command, check=False).returncode)
        case _:
            sys.exit(f"nothing here knows what {words} would do")


if __name__ == "__main__":
    {"helm": helm, "kubectl": kubectl}[sys.argv[1]](sys.argv[2:])
