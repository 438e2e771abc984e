//! The chart, rendered by Helm's own engine: what Kubernetes takes, what it refuses, and that chart, programs, schema and documents say the same.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use mayfly_tests::{
    chart::{Answer, render, render_all},
    service::{self, finish, program},
};
use serde_json::{Map, Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn schema() -> Value {
    serde_json::from_slice(&fs::read(root().join("helm/mayfly/values.schema.json")).unwrap()).unwrap()
}

/// Everything that is off by itself.
fn everything() -> Value {
    json!({
        "image": { "repository": "registry.example:5000/tools/mayfly", "digest": format!("sha256:{}", "0".repeat(64)), "pullSecrets": [{ "name": "registry" }] },
        "auth": { "mode": "jwksUrl", "jwksUrl": "https://issuer.example/keys", "caKey": "ca.pem", "issuer": "https://issuer.example" },
        "keys": { "existingSecret": "mayfly-keys" },
        "tls": { "existingSecret": "mayfly-tls" },
        "settings": { "MAYFLY_TENANTS": "registered" },
        "service": { "type": "LoadBalancer", "port": 443, "annotations": { "example.org/a": "b" } },
        "nodeSelector": { "mayfly": "yes" },
        "tolerations": [{ "key": "mayfly", "operator": "Exists", "effect": "NoSchedule" }],
        "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [{ "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["a"] }] }] } } },
        "priorityClassName": "important",
        "podAnnotations": { "a": "b" },
        "podLabels": { "c": "d" },
        "updateStrategy": { "maxUnavailable": "10%" },
        "keeper": { "requireFences": ["landlock", "apparmor"], "resources": { "limits": { "memory": "1Gi" } } },
        "networkPolicy": { "apiFrom": [{ "podSelector": { "matchLabels": { "app": "shop" } } }], "egress": [{ "to": [{ "ipBlock": { "cidr": "10.1.0.0/16" } }] }] },
        "monitoring": { "serviceMonitor": { "enabled": true, "labels": { "release": "prometheus" } }, "prometheusRule": { "enabled": true } },
    })
}

fn pod(answer: &Answer) -> &Value {
    &answer.only("DaemonSet")["spec"]["template"]["spec"]
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers"].into_iter().flat_map(move |list| pod[list].as_array().into_iter().flatten())
}

fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    containers(pod).find(|container| container["name"] == name).unwrap()
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().map(|item| item["name"].as_str().unwrap()).collect()
}

#[test]
fn what_the_chart_makes_of_its_own_values_and_of_others_kubernetes_takes() {
    let modes = [
        json!({ "auth": { "mode": "publicKey", "publicKeys": [{ "key": "a.pem", "kid": "1" }, { "key": "b.pem" }] } }),
        json!({ "auth": { "mode": "jwksFile" } }),
        json!({ "auth": { "mode": "jwksUrl", "jwksUrl": "https://issuer.example/keys" } }),
    ];
    let sets: Vec<Value> = [json!({}), everything()].into_iter().chain(modes).collect();

    let chart = render_all(&sets);

    for answer in &chart.answers {
        assert_eq!(answer.error, None);
        // The Prometheus Operator's kinds have no schema among Kubernetes' own; what is in them is looked at below.
        let faults: Vec<_> =
            answer.faults.iter().filter(|fault| !fault.starts_with("ServiceMonitor ") && !fault.starts_with("PrometheusRule ")).collect();
        assert!(faults.is_empty(), "{faults:#?}");
    }
    let kinds: Vec<&str> = chart.answers[0].objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    let expected = ["DaemonSet", "Job", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "Service", "ServiceAccount"];
    assert_eq!(kinds, expected);
    assert_eq!((chart.answers[1].of_kind("ServiceMonitor").count(), chart.answers[1].of_kind("PrometheusRule").count()), (1, 1));
    assert_eq!(chart.lint["errors"], json!([]));
    let said: Vec<_> = chart.lint["messages"].as_array().unwrap().iter().map(|message| message["error"].as_str().unwrap()).collect();
    assert_eq!(said, ["icon is recommended"]);
    // Chart and programs are one release.
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!((&chart.metadata["version"], &chart.metadata["appVersion"]), (&json!(version), &json!(version)));
}

#[test]
fn the_schema_names_every_value_and_no_other() {
    let chart = render_all(&[]);
    let mut differ = Vec::new();
    compare(&schema(), &chart.values, "", &mut differ);
    assert!(differ.is_empty(), "{differ:#?}");
}

fn compare(schema: &Value, values: &Value, at: &str, differ: &mut Vec<String>) {
    let (Some(known), Some(there)) = (schema["properties"].as_object(), values.as_object()) else { return };
    if schema["additionalProperties"] != false {
        differ.push(format!("{at}: any other name would be taken"));
    }
    // Helm's own, for charts with parts.
    differ.extend(
        known.keys().filter(|name| !there.contains_key(*name) && *name != "global").map(|name| format!("{at}/{name}: not in values.yaml")),
    );
    differ.extend(there.keys().filter(|name| !known.contains_key(*name)).map(|name| format!("{at}/{name}: not in the schema")));
    for (name, inner) in known {
        compare(inner, &values[name], &format!("{at}/{name}"), differ);
    }
}

/// Values that this part of the schema is against, each with the place that is wrong in it.
fn wrong(schema: &Value, all: &Value) -> Vec<Value> {
    if let Some(reference) = schema["$ref"].as_str() {
        return wrong(all.pointer(reference.strip_prefix('#').unwrap()).unwrap(), all);
    }
    if schema["enum"].is_array() {
        return vec![json!("nonsense"), json!(7)];
    }
    if let Some(choices) = schema["anyOf"].as_array() {
        // What is wrong for one may be right for the next one, but for a list.
        assert!(choices.iter().all(|choice| choice["type"] != "array"));
        return vec![json!([]), json!(0), json!("0%"), json!("many")];
    }
    match schema["type"].as_str().unwrap() {
        "boolean" => vec![json!("yes"), json!(1)],
        "integer" => {
            let beyond = [schema["minimum"].as_i64().map(|min| min - 1), schema["maximum"].as_i64().map(|max| max + 1)];
            beyond.into_iter().flatten().map(Value::from).chain([json!("1"), json!(1.5)]).collect()
        }
        "string" => {
            let mut found = vec![json!(7), json!(["a"])];
            if schema["pattern"].is_string() {
                found.push(json!("@ line\nand another, = / 😀"));
            }
            if schema["minLength"].is_u64() {
                found.push(json!(""));
            }
            found
        }
        "array" => {
            let items = wrong(&schema["items"], all).into_iter().map(|item| json!([item]));
            items.chain([json!("a"), json!({ "a": 1 })]).collect()
        }
        "object" => {
            let mut found = vec![json!("a"), json!([1])];
            if schema["additionalProperties"] == false {
                found.push(json!({ "nobodyKnows": 1 }));
            } else if schema["additionalProperties"].is_object() {
                found.extend(wrong(&schema["additionalProperties"], all).into_iter().map(|value| json!({ "MAYFLY_TENANTS": value })));
            }
            if schema["propertyNames"].is_object() {
                found.extend([json!({ "PATH": "a" }), json!({ "MAYFLY_DATABASE_URL": "postgres://me:secret@host" })]);
            }
            for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
                found.extend(wrong(inner, all).into_iter().map(|value| Value::Object(Map::from_iter([(name.clone(), value)]))));
            }
            found
        }
        other => panic!("{other}"),
    }
}

#[test]
fn every_value_that_is_wrong_is_refused_by_its_name() {
    let schema = schema();
    let mut sets: Vec<Value> = schema["properties"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(name, inner)| wrong(inner, &schema).into_iter().map(move |value| json!({ name: value })))
        .collect();
    sets.push(json!({ "nobodyKnows": 1 }));
    // What one value says of another.
    sets.extend([
        json!({ "auth": { "mode": "publicKey" } }),
        json!({ "auth": { "mode": "jwksUrl" } }),
        json!({ "auth": { "mode": "secret", "existingSecret": "" } }),
        json!({ "auth": { "mode": "jwksUrl", "jwksUrl": "https://issuer.example", "caKey": "ca.pem", "existingSecret": "" } }),
    ]);

    let chart = render_all(&sets);

    assert!(sets.len() > 150, "{}", sets.len());
    let mut taken = Vec::new();
    for (set, answer) in sets.iter().zip(&chart.answers) {
        let (name, value) = set.as_object().unwrap().iter().next().unwrap();
        // Of a name that may not be, Helm tells that one alone.
        let inner = value.as_object().and_then(|value| value.keys().next()).unwrap_or(name);
        let is_named = |error: &String| error.contains("schema") && (error.contains(name.as_str()) || error.contains(inner.as_str()));
        if !answer.error.as_ref().is_some_and(is_named) {
            taken.push(format!("{set}: {:?}", answer.error));
        }
    }
    assert!(taken.is_empty(), "{taken:#?}");
}

fn help(name: &str, words: &[&str]) -> String {
    let (status, said) = finish(Command::new(program(name)).args(words), Duration::from_secs(30)).unwrap();
    assert!(status.success(), "{said}");
    said
}

/// The variables of a help's text.
fn variables(help: &str) -> BTreeSet<&str> {
    let names = help.split("[env: ").skip(1);
    names.map(|rest| rest.split(|c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit() && c != '_').next().unwrap()).collect()
}

#[test]
fn whatever_the_chart_tells_a_program_the_program_knows() {
    let (serve, migrate, keeper) =
        (help("mayfly", &["serve", "--help"]), help("mayfly", &["migrate", "--help"]), help("sandbox-keeper", &["--help"]));
    let known = variables(&serve);
    let sets = [
        json!({ "auth": { "mode": "publicKey", "publicKeys": [{ "key": "a.pem" }] } }),
        json!({ "auth": { "mode": "jwksFile" } }),
        json!({}),
        everything(),
    ];
    let mut made = BTreeSet::new();
    for answer in &render_all(&sets).answers {
        let pod = pod(answer);
        made.extend(names(&container(pod, "service")["env"]).into_iter().map(str::to_owned));
        let hook = &answer.only("Job")["spec"]["template"]["spec"]["containers"][0];
        assert_eq!((&hook["command"], names(&hook["env"])), (&json!(["mayfly", "migrate"]), vec!["MAYFLY_DATABASE_URL"]));
        let words: Vec<_> = container(pod, "keeper")["command"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        let own = words.iter().skip_while(|word| **word != "sandbox-keeper").skip(1);
        for flag in own.map(|word| word.split('=').next().unwrap()) {
            assert!(keeper.contains(&format!("{flag} ")), "{flag}");
        }
    }
    assert!(variables(&migrate).contains("MAYFLY_DATABASE_URL"), "{migrate}");
    // POD_IP is Kubernetes' own, for the address below it.
    let strange: Vec<_> = made.iter().filter(|name| !known.contains(name.as_str()) && *name != "POD_IP").collect();
    assert!(strange.is_empty(), "{strange:?}");
    // What `settings` may not say is what the chart says itself, or what makes no sense in a pod; each is there.
    let schema = schema();
    let kept: BTreeSet<&str> = schema["properties"]["settings"]["propertyNames"]["not"]["enum"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    assert!(kept.is_subset(&known), "{:?}", kept.difference(&known));
    let mut open: Vec<_> = made.iter().filter(|name| !kept.contains(name.as_str())).collect();
    // The one that everything() sets.
    open.retain(|name| *name != "MAYFLY_TENANTS" && *name != "POD_IP");
    assert!(open.is_empty(), "settings could say otherwise: {open:?}");
}

/// What a container may do beyond its own program, in the words of the table.
fn privileges(container: &Value) -> BTreeSet<String> {
    let security = &container["securityContext"];
    let mut found = BTreeSet::new();
    if security["runAsUser"] == 0 {
        found.insert("root".to_owned());
    }
    if security["privileged"] == true {
        found.insert("privileged".to_owned());
    } else {
        assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "{container}");
        assert_eq!((&security["allowPrivilegeEscalation"], &security["seccompProfile"]["type"]), (&json!(false), &json!("RuntimeDefault")));
    }
    assert_eq!(security["readOnlyRootFilesystem"], true);
    found.extend(security["capabilities"]["add"].as_array().into_iter().flatten().map(|name| name.as_str().unwrap().to_lowercase()));
    let bounding =
        container["command"].as_array().unwrap().iter().find_map(|word| word.as_str().unwrap().strip_prefix("--bounding-set=-all,"));
    found.extend(bounding.into_iter().flat_map(|names| names.split(',')).map(|name| name.strip_prefix('+').unwrap().to_owned()));
    for mount in container["volumeMounts"].as_array().into_iter().flatten() {
        let is_read_only = if mount["readOnly"] == true { " (read only)" } else { "" };
        found.insert(format!("{}{is_read_only}", mount["mountPath"].as_str().unwrap()));
    }
    found
}

#[test]
fn the_privileges_of_the_pod_are_those_of_the_table_and_each_is_explained() {
    let text = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let table = text.split_once("### Privileges").unwrap().1.split("\n#").next().unwrap();
    let mut listed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [container, privilege, reason] = cells[..] else { panic!("{line}") };
        assert!(reason.len() > 15, "{line}");
        listed.entry(container.replace('`', "")).or_default().insert(privilege.replace('`', ""));
    }
    let answer = render(json!({ "keys": { "existingSecret": "mayfly-keys" }, "tls": { "existingSecret": "mayfly-tls" } }));
    let pod = pod(&answer);
    let has: BTreeMap<String, BTreeSet<String>> =
        containers(pod).map(|one| (one["name"].as_str().unwrap().to_owned(), privileges(one))).collect();

    assert_eq!(has, listed);
    assert_eq!(has.keys().collect::<Vec<_>>(), ["folders", "keeper", "service"]);
    for namespace in ["hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"] {
        assert!(pod[namespace].is_null(), "{namespace}");
    }
    assert_eq!((&pod["automountServiceAccountToken"], &pod["enableServiceLinks"]), (&json!(false), &json!(false)));
    let hook = &answer.only("Job")["spec"]["template"]["spec"];
    assert_eq!(privileges(&hook["containers"][0]), BTreeSet::new());
    assert_eq!(hook["automountServiceAccountToken"], false);
    let service = &container(pod, "service")["securityContext"];
    assert_eq!(
        (&service["runAsNonRoot"], &service["runAsUser"], &service["capabilities"]),
        (&json!(true), &json!(10001), &json!({ "drop": ["ALL"] }))
    );
}

#[test]
fn nodes_know_each_other_by_the_address_of_their_pod_and_by_https_where_there_is_a_certificate() {
    let told = |values: Value| {
        let answer = render(values);
        let env = container(pod(&answer), "service")["env"].as_array().unwrap().clone();
        let names = |variable: &&Value| variable["name"].as_str().unwrap().starts_with("MAYFLY_PEER_");
        env.iter()
            .filter(names)
            .map(|variable| (variable["name"].as_str().unwrap().to_owned(), variable["value"].as_str().unwrap().to_owned()))
            .collect::<Vec<_>>()
    };
    let expect =
        |pairs: &[(&str, &str)]| pairs.iter().map(|(name, value)| (format!("MAYFLY_PEER_{name}"), (*value).to_owned())).collect::<Vec<_>>();

    assert_eq!(told(json!({})), expect(&[("ADDRESS", "http://$(POD_IP):8080"), ("HTTP", "true")]));
    let tls = json!({ "tls": { "existingSecret": "a" }, "peers": { "family": "IPv6", "tlsName": "nodes.example", "caKey": "ca.crt" } });
    let by_https = [("ADDRESS", "https://[$(POD_IP)]:8080"), ("TLS_NAME", "nodes.example"), ("CA_FILE", "/etc/mayfly/tls/ca.crt")];
    assert_eq!(told(tls), expect(&by_https));
    assert_eq!(told(json!({ "peers": { "enabled": false } })), []);
}

#[test]
fn the_keeper_begins_before_the_service_ends_after_it_and_both_have_the_time_they_need() {
    let answer = render(json!({ "drainSeconds": 1200, "stopGraceSeconds": 30 }));
    let pod = pod(&answer);
    let order: Vec<_> = containers(pod).map(|one| (one["name"].as_str().unwrap(), one["restartPolicy"].as_str())).collect();

    // A sidecar, as Kubernetes has it: in the order of the init containers, restarted, and stopped when the others have ended.
    assert_eq!(order, [("folders", None), ("keeper", Some("Always")), ("service", None)]);
    assert!(container(pod, "keeper")["startupProbe"].is_object() && container(pod, "keeper")["livenessProbe"].is_null());
    let env = container(pod, "service")["env"].as_array().unwrap();
    let value = |name: &str| env.iter().find(|variable| variable["name"] == name).unwrap()["value"].as_str().unwrap();
    assert_eq!((value("MAYFLY_DRAIN_S"), value("MAYFLY_STOP_GRACE_S")), ("1200", "30"));
    // serve.rs: ends of sandboxes 10, last answers 2, webhooks, traces and the database 2 each; helpers.rs: the keeper 20.
    assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() >= 1200 + 30 + 10 + 2 + 6 + 20);
    assert_eq!(answer.only("DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"], json!({ "maxUnavailable": 1, "maxSurge": 0 }));
    // Both speak over one socket, for which the service's group is enough.
    let socket = value("MAYFLY_KEEPER_SOCKET");
    let words = container(pod, "keeper")["command"].as_array().unwrap();
    assert!(words.contains(&json!(format!("--socket={socket}"))) && words.contains(&json!("--group=10001")), "{words:?}");
    let volume = |name: &str| {
        let mounts = container(pod, name)["volumeMounts"].as_array().unwrap();
        mounts.iter().find(|mount| socket.starts_with(mount["mountPath"].as_str().unwrap()) && mount["mountPath"] != "/run/mayfly").unwrap()
            ["name"]
            .clone()
    };
    assert_eq!(volume("keeper"), volume("service"));
}

#[test]
fn the_schema_of_the_database_is_brought_up_to_date_before_anything_of_a_release_changes() {
    let answer = render(everything());
    let job = answer.only("Job");
    let notes = &job["metadata"]["annotations"];

    assert_eq!(notes["helm.sh/hook"], "pre-install,pre-upgrade");
    assert_eq!(notes["helm.sh/hook-delete-policy"], "before-hook-creation,hook-succeeded");
    let others = answer.objects.iter().filter(|object| object["metadata"]["annotations"]["helm.sh/hook"].is_string());
    assert_eq!(others.count(), 1, "nothing else is there that early");
    let pod = &job["spec"]["template"]["spec"];
    // So it names nothing that the chart makes.
    assert!(pod["serviceAccountName"].is_null() && pod["volumes"].is_null(), "{pod}");
    assert_eq!(pod["nodeSelector"]["mayfly"], "yes");
    assert_eq!(render(json!({ "migration": { "enabled": false } })).of_kind("Job").count(), 0);
}

#[test]
fn nothing_that_is_secret_is_in_an_object_and_secrets_that_exist_are_named() {
    let answer = render(everything());

    assert_eq!(answer.of_kind("Secret").count(), 0);
    let pod = pod(&answer);
    let url =
        container(pod, "service")["env"].as_array().unwrap().iter().find(|variable| variable["name"] == "MAYFLY_DATABASE_URL").unwrap();
    assert_eq!(url["valueFrom"]["secretKeyRef"], json!({ "name": "mayfly-database", "key": "url" }));
    let mounted: BTreeSet<_> =
        pod["volumes"].as_array().unwrap().iter().filter_map(|volume| volume["secret"]["secretName"].as_str()).collect();
    assert_eq!(mounted, BTreeSet::from(["mayfly-auth", "mayfly-keys", "mayfly-tls"]));
    // 0440: the pod's group is the service's.
    let modes: Vec<_> = pod["volumes"].as_array().unwrap().iter().filter_map(|volume| volume["secret"]["defaultMode"].as_u64()).collect();
    assert_eq!((modes, &pod["securityContext"]["fsGroup"]), (vec![0o440; 3], &json!(10001)));
    let keeper = container(pod, "keeper");
    assert!(
        keeper["env"].is_null() && !keeper["volumeMounts"].to_string().contains("/etc/mayfly"),
        "what holds a tenant's code in check knows no secret"
    );
}

#[test]
fn boards_and_alerts_are_those_of_the_repository() {
    let answer = render(everything());
    let dashboards = root().join("helm/dashboards");
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for entry in fs::read_dir(&dashboards).unwrap().flatten().filter(|entry| entry.path().extension().is_some_and(|end| end == "json")) {
        files.insert(entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap());
    }
    let data: BTreeMap<String, String> = serde_json::from_value(answer.only("ConfigMap")["data"].clone()).unwrap();

    assert_eq!(data, files);
    let text = fs::read_to_string(dashboards.join("alerts.yaml")).unwrap();
    let rules: Value = serde_saphyr::from_str(&text).unwrap();
    let spec = &answer.only("PrometheusRule")["spec"];
    assert_eq!(spec, &rules);
    let folder = service::folder().unwrap();
    let file = folder.path().join("rules.yaml");
    fs::write(&file, spec.to_string()).unwrap();
    let (status, said) = finish(Command::new("promtool").args(["check", "rules"]).arg(&file), Duration::from_secs(60)).unwrap();
    assert!(status.success(), "{said}");
}

#[test]
fn whoever_selects_nodes_finds_them() {
    let answer = render(everything());
    let set = answer.only("DaemonSet");
    let labels = set["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    let finds = |selector: &Value| selector.as_object().unwrap().iter().all(|(name, value)| labels.get(name) == Some(value));
    let ports: BTreeMap<_, _> = container(pod(&answer), "service")["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|port| (port["name"].as_str().unwrap(), &port["containerPort"]))
        .collect();
    let listens: Vec<_> = ["MAYFLY_LISTEN", "MAYFLY_METRICS_LISTEN"]
        .map(|name| {
            container(pod(&answer), "service")["env"].as_array().unwrap().iter().find(|variable| variable["name"] == name).unwrap()["value"]
                .clone()
        })
        .into();

    assert_eq!(listens, [format!("0.0.0.0:{}", ports["api"]), format!("0.0.0.0:{}", ports["metrics"])]);
    for service in answer.of_kind("Service") {
        assert!(finds(&service["spec"]["selector"]), "{service}");
        for port in service["spec"]["ports"].as_array().unwrap() {
            assert!(ports.contains_key(port["targetPort"].as_str().unwrap()), "{port}");
        }
    }
    for selector in [
        &set["spec"]["selector"]["matchLabels"],
        &answer.only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        &answer.only("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ] {
        assert!(finds(selector), "{selector}");
    }
    let hook = answer.only("Job")["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    assert_ne!(
        hook["app.kubernetes.io/component"], labels["app.kubernetes.io/component"],
        "a Service would send requests to the migration"
    );
    // The metrics' Service, which alone has that label, has the port that is asked for.
    let monitor = &answer.only("ServiceMonitor")["spec"];
    let wanted = monitor["selector"]["matchLabels"].as_object().unwrap();
    let scraped: Vec<_> = answer
        .of_kind("Service")
        .filter(|service| wanted.iter().all(|(name, value)| &service["metadata"]["labels"][name] == value))
        .collect();
    assert_eq!(scraped.len(), 1);
    assert_eq!(scraped[0]["spec"]["ports"][0]["name"], monitor["endpoints"][0]["port"]);
    assert!(scraped[0]["metadata"]["name"].as_str().unwrap().contains("mayfly"), "alerts know the job by it");
}

#[test]
fn the_network_lets_in_what_is_asked_for_and_never_out_to_a_machines_metadata() {
    let (plain, open) = (render(json!({})), render(everything()));
    let rules = |answer: &Answer, way: &str| answer.only("NetworkPolicy")["spec"][way].as_array().unwrap().clone();

    assert_eq!(plain.only("NetworkPolicy")["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
    let ingress = rules(&plain, "ingress");
    assert_eq!(ingress[0], json!({ "ports": [{ "port": "api", "protocol": "TCP" }] }));
    let monitoring = json!([{ "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": "monitoring" } } }]);
    assert_eq!((&ingress[1]["ports"][0]["port"], &ingress[1]["from"], ingress.len()), (&json!("metrics"), &monitoring, 2));
    let nodes = &open.only("DaemonSet")["spec"]["selector"];
    let from = json!([{ "podSelector": { "matchLabels": { "app": "shop" } } }, { "podSelector": nodes }]);
    assert_eq!(rules(&open, "ingress")[0]["from"], from, "nodes reach each other, whoever else may not");
    let world = rules(&plain, "egress").into_iter().find(|rule| rule["to"].to_string().contains("0.0.0.0/0")).unwrap();
    assert_eq!(world["to"][0]["ipBlock"]["except"], json!(["169.254.0.0/16"]));
    assert_eq!(world["ports"], json!([{ "port": 443, "protocol": "TCP" }]));
    assert!(rules(&open, "egress").contains(&json!({ "to": [{ "ipBlock": { "cidr": "10.1.0.0/16" } }] })));
    let nobody = render(json!({ "networkPolicy": { "metricsFrom": [] } }));
    assert_eq!(rules(&nobody, "ingress").len(), 1, "an empty list lets nobody at the metrics, not everybody");
}
