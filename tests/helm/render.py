"""What Helm makes of a chart, by its own engine, and what Kubernetes' schemas have against it: a list of cases on stdin, a list of answers on stdout."""

import json
import sys

import helm_python
import helm_python.chart
import kubernetes_validate
import yaml


def faults(thing, versions):
    """What is against it, field by field: also fields that nobody knows."""
    for version in versions:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as fault:
            path = ".".join(str(part) for part in fault.path)
            yield f"{thing['kind']} {thing['metadata']['name']} in {version}: {path}: {fault.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{thing['kind']} {thing['metadata']['name']} in {version}: a kind without a schema"


def answer(chart, case):
    try:
        files = chart.render(case["values"], name=case["name"], namespace="sandboxes")
    except helm_python.HelmError as error:
        return {"error": str(error)}
    # What kubectl has of YAML: 1.1, as PyYAML.
    objects = [thing for name, text in sorted(files.items()) if name.endswith(".yaml") for thing in yaml.safe_load_all(text) if thing]
    return {
        "objects": objects,
        "texts": files,
        "faults": [fault for thing in objects for fault in faults(thing, case["versions"])],
    }


def main():
    asked = json.load(sys.stdin)
    with helm_python.chart.Chart.load(asked["chart"]) as chart:
        answers = [answer(chart, case) for case in asked["cases"]]
        lint = helm_python.chart.lint(asked["chart"], {}, strict=True)
        json.dump({"metadata": chart.metadata, "values": chart.values, "lint": lint, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
