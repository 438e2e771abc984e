//! `make dashboard` shows the boards of `helm/dashboards` with live figures of a service that runs, and leaves nothing behind.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "dashboard/browser.rs"]
mod browser;
#[path = "dashboard/shown.rs"]
mod shown;

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use mayfly_tests::{
    Client, host,
    service::{self, shared},
};
use serde_json::{Value, json};
use shown::{Dashboard, script};

/// How long a figure may take to come on a loaded machine: a few times of scraping.
const PATIENCE: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Every board, by the name of its file.
fn boards() -> Vec<(String, Value)> {
    let files = fs::read_dir(root().join("helm/dashboards")).unwrap().map(|entry| entry.unwrap().path());
    let boards = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    boards
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), serde_json::from_slice(&fs::read(&path).unwrap()).unwrap()))
        .collect()
}

/// What stands between these two, each time, in a page.
fn between<'a>(page: &'a str, begin: &str, end: &str) -> Vec<&'a str> {
    page.split(begin).skip(1).map(|rest| rest.split_once(end).unwrap().0).collect()
}

/// The part of a page that shows this panel.
fn panel<'a>(page: &'a str, title: &str) -> &'a str {
    let shown = between(page, "<section ", "</section>");
    shown.into_iter().find(|section| section.contains(&format!(">{title}</h3>"))).unwrap_or_else(|| panic!("no {title} in {page}"))
}

/// The one figure of a panel.
fn figure(page: &str, title: &str) -> String {
    let part = between(panel(page, title), "<span", "</span>")[0];
    part.split_once('>').unwrap().1.to_owned()
}

/// Looks at a board until this is so; fails with the page.
async fn look_until(dashboard: &Dashboard, board: &str, is_so: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let page = dashboard.page(board).await;
        if is_so(&page) {
            return page;
        }
        assert!(Instant::now() < deadline, "{page}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn figures_of_the_boards_follow_what_the_service_does() {
    let service = shared();
    let client = service.client();
    let dashboard = Dashboard::start(&client, &[]).unwrap();
    client.shell("echo one").await;
    look_until(&dashboard, "tenant", |page| figure(page, "Ends in this month") == "1").await;

    client.shell("echo two").await;
    client.run(&json!({ "image": "busybox", "command": ["sleep", "9"], "limits": { "wall_ms": 100 } })).await;

    let page = look_until(&dashboard, "tenant", |page| figure(page, "Ends in this month") == "3").await;
    let ends = panel(&page, "Ends in the last minute, by reason");
    assert!(ends.contains("<tr><th>wall_timeout</th><td>1</td></tr>"), "{ends}");
    let is_some =
        |figure: &str| figure.starts_with(|first: char| first.is_ascii_digit()) && figure.contains(|digit| ('1'..='9').contains(&digit));
    look_until(&dashboard, "overview", |page| is_some(&figure(page, "Ends per second"))).await;
    look_until(&dashboard, "launch", |page| is_some(&figure(page, "Launch, half"))).await;
    let page = dashboard.page("node").await;
    assert_eq!((figure(&page, "Takes work"), figure(&page, "Short of memory or disk")), ("yes".to_owned(), "no".to_owned()));
}

#[tokio::test]
async fn each_board_is_a_page_with_every_row_panel_and_expression_in_order() {
    let dashboard = Dashboard::start(&shared().client(), &[]).unwrap();
    let told: BTreeSet<_> = dashboard.boards().collect();
    let boards = boards();
    assert_eq!(told, boards.iter().map(|(name, _)| name.as_str()).collect(), "each board is told of");

    for (name, board) in boards {
        let page = dashboard.page(&name).await;
        let mut panels: Vec<&Value> = board["panels"].as_array().unwrap().iter().collect();
        panels.sort_by_key(|panel| (panel["gridPos"]["y"].as_u64(), panel["gridPos"]["x"].as_u64()));
        let titles: Vec<&str> = panels.iter().map(|panel| panel["title"].as_str().unwrap()).collect();
        let main = page.split_once("<main>").unwrap().1;
        let headings: Vec<String> =
            between(main, "<h", "</h").iter().map(|heading| unescaped(heading.rsplit_once('>').unwrap().1)).collect();
        assert_eq!(headings, titles, "{name}");
        assert!(page.contains(&format!("<title>{}</title>", board["title"].as_str().unwrap())), "{name}");
        let shown = between(main, "<section ", "</section>");
        let drawn_or_told: Vec<_> = panels.iter().filter(|panel| panel["type"] != "row").collect();
        assert_eq!(shown.len(), drawn_or_told.len(), "{name}");
        for (shown, panel) in shown.into_iter().zip(drawn_or_told) {
            let title = panel["title"].as_str().unwrap();
            if panel["type"] == "stat" {
                assert!(shown.contains("class=\"figure\""), "{name}: {title}: {shown}");
                continue;
            }
            let drawn: Value = serde_json::from_str(&unescaped(between(shown, "data-panel=\"", "\"")[0])).unwrap();
            let drawn: Vec<_> = drawn["series"].as_array().unwrap().iter().map(|series| series["expression"].as_str().unwrap()).collect();
            let wanted = panel["targets"].as_array().unwrap().iter();
            let wanted: Vec<_> = wanted.map(|target| target["expr"].as_str().unwrap().replace("$__rate_interval", "30s")).collect();
            assert_eq!(drawn, wanted, "{name}: {title}");
        }
    }
}

/// What the attributes of the pages are escaped by, taken back.
fn unescaped(attribute: &str) -> String {
    let names = [("&quot;", "\""), ("&#39;", "'"), ("&apos;", "'"), ("&lt;", "<"), ("&gt;", ">"), ("&#123;", "{"), ("&amp;", "&")];
    names.iter().fold(attribute.to_owned(), |text, (name, meant)| text.replace(name, meant))
}

#[tokio::test]
async fn a_browser_draws_every_graph_that_has_figures() {
    let client = shared().client();
    let dashboard = Dashboard::start(&client, &[]).unwrap();
    client.shell("echo one").await;
    look_until(&dashboard, "launch", |page| figure(page, "Launches per second").ends_with("/s")).await;
    client.shell("echo two").await;
    look_until(&dashboard, "launch", |page| figure(page, "Launches per second") != "0/s").await;

    for board in dashboard.boards() {
        let page = browser::page(&dashboard.url(board));

        let graphs: Vec<_> =
            between(&page, "<section ", "</section>").into_iter().filter(|section| section.contains("class=\"graph\"")).collect();
        assert!(graphs.len() > 5, "{board}: {page}");
        let mut drawn = 0;
        for graph in graphs {
            assert!(!graph.contains("Error loading data") && !graph.contains("NaN"), "{board}: {graph}");
            // Axes are paths, too.
            let is_line = |path: &&str| (path.contains("class=\"path\"") || path.contains("class=\"area\"")) && path.contains(" d=\"M");
            let has_lines = between(graph, "<path", ">").iter().any(is_line);
            // What is no number is told as a dash, and is no line.
            let figures = graph.split_once("data-live").unwrap().1;
            let has_figures = between(figures, "<td>", "</td>").iter().any(|value| *value != "–");
            assert!(has_lines || !has_figures, "{board}: {graph}");
            drawn += usize::from(has_lines);
        }
        assert!(drawn > 5, "{board}: {drawn} graphs are drawn");
    }
}

#[tokio::test]
async fn no_root_is_needed_and_nothing_is_left_behind() {
    let client = shared().client();
    // The nobody of this machine can read no folder of root's.
    let folder = service::folder().unwrap();
    for part in ["tools", "helm"] {
        let copied = Command::new("cp").arg("-r").arg(root().join(part)).arg(folder.path()).status().unwrap();
        assert!(copied.success());
    }
    let mut dashboard = Dashboard::start_as_nobody(&client, folder.path()).unwrap();
    let page = look_until(&dashboard, "overview", |page| figure(page, "Nodes that take work") == "1").await;
    assert!(page.contains("no alert fires"), "{page}");

    let marker = dashboard.folder().display().to_string();
    assert!(!host::processes_with(&marker).is_empty(), "Prometheus has its data there");
    let status = dashboard.interrupt().unwrap();

    assert!(status.success(), "{status}");
    assert_eq!(host::processes_with(&marker), [] as [u32; 0]);
    let left: Vec<_> = fs::read_dir(dashboard.folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn prometheus_is_not_root_where_the_script_is() {
    let dashboard = Dashboard::start(&shared().client(), &[]).unwrap();

    let shown = host::processes_with(&format!("--storage.tsdb.path={}", dashboard.folder().display()));

    assert_eq!(shown.len(), 1, "{shown:?}");
    let ids = host::status_field(shown[0], "Uid").unwrap();
    assert!(ids.split_whitespace().all(|id| id != "0"), "{ids}");
    let may = host::status_field(shown[0], "CapBnd").unwrap();
    assert_eq!(u64::from_str_radix(&may, 16), Ok(0), "{may}");
}

#[tokio::test]
async fn prometheus_ends_with_a_script_that_is_killed() {
    let mut dashboard = Dashboard::start(&shared().client(), &[]).unwrap();
    let folder = dashboard.folder().display().to_string();
    assert!(!host::processes_with(&folder).is_empty());

    dashboard.kill();

    let deadline = Instant::now() + PATIENCE;
    while !host::processes_with(&folder).is_empty() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn without_a_service_it_says_where_it_looked_for_one() {
    let folder = service::folder().unwrap();
    // Nobody listens on the port of echo, and what is below 1024 is given to nobody by chance.
    let mut command = script(&root(), folder.path());
    let (status, said) = service::finish(command.env("METRICS_LISTEN", "127.0.0.1:7"), PATIENCE).unwrap();

    assert!(!status.success(), "{said}");
    assert!(said.contains("http://127.0.0.1:7/metrics") && said.contains("make run"), "{said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Stands where Grafana would, which no registry of ours has: it keeps what it was started with, and says that it is well.
const STAND_IN: &str = r#"#!/usr/bin/env python3
import http.server, json, os, pathlib, sys
provisioning = pathlib.Path(os.environ["GF_PATHS_PROVISIONING"])
handed = {str(path.relative_to(provisioning)): path.read_text() for path in provisioning.rglob("*.yaml")}
boards = {path.name: path.read_text() for path in pathlib.Path(os.environ["MAYFLY_BOARDS"]).glob("*.json")}
class Well(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ), "handed": handed, "boards": boards, "user": os.getuid()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.HTTPServer(address, Well).serve_forever()
"#;

#[tokio::test]
async fn a_stand_in_for_grafana_is_handed_this_prometheus_and_the_boards_byte_for_byte() {
    let client = shared().client();
    let programs = service::folder().unwrap();
    // As an archive of Grafana is laid out.
    for (name, text) in [("bin/grafana", STAND_IN), ("conf/defaults.ini", "")] {
        let path = programs.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }
    fs::create_dir(programs.path().join("on-path")).unwrap();
    symlink("../bin/grafana", programs.path().join("on-path/grafana")).unwrap();
    let path = format!("{}:{}", programs.path().join("on-path").display(), shown::PATH);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");

    let dashboard = Dashboard::start(&client, &[("PATH", &path), ("GRAFANA_LISTEN", &listen)]).unwrap();

    assert!(dashboard.said().contains(&format!("http://{listen}/dashboards")), "{}", dashboard.said());
    let handed: Value = reqwest::get(format!("http://{listen}/api/health")).await.unwrap().json().await.unwrap();
    let home = programs.path().canonicalize().unwrap();
    assert_eq!(handed["arguments"], json!(["server", format!("--homepath={}", home.display())]));
    assert_ne!(handed["user"], 0);
    let environment = &handed["environment"];
    let filled = |name: &str| {
        let text = handed["handed"][name].as_str().unwrap_or_else(|| panic!("{handed:#}"));
        // As Grafana puts its environment into values.
        let text = ["MAYFLY_PROMETHEUS_URL", "MAYFLY_SCRAPE_INTERVAL", "MAYFLY_BOARDS"]
            .iter()
            .fold(text.to_owned(), |text, name| text.replace(&format!("${name}"), environment[name].as_str().unwrap()));
        serde_saphyr::from_str::<Value>(&text).unwrap()
    };
    let source = &filled("datasources/mayfly.yaml")["datasources"][0];
    assert_eq!(
        (&source["type"], &source["isDefault"], source["url"].as_str()),
        (&json!("prometheus"), &json!(true), Some(dashboard.prometheus()))
    );
    let provider = &filled("dashboards/mayfly.yaml")["providers"][0];
    assert_eq!((&provider["type"], &provider["options"]["path"]), (&json!("file"), &environment["MAYFLY_BOARDS"]));
    for (name, _) in boards() {
        let file = format!("{name}.json");
        assert_eq!(handed["boards"][&file], fs::read_to_string(root().join("helm/dashboards").join(&file)).unwrap());
    }
    let anonymous =
        ["GF_AUTH_ANONYMOUS_ENABLED", "GF_AUTH_ANONYMOUS_ORG_ROLE", "GF_SERVER_HTTP_ADDR"].map(|name| environment[name].as_str().unwrap());
    assert_eq!(anonymous, ["true", "Viewer", "127.0.0.1"]);
    assert!(environment.get("MAYFLY_TOKEN").is_none(), "a token is nothing for Grafana");
}

/// Somebody without a token, or whose token may not read metrics.
#[tokio::test]
async fn without_a_token_for_metrics_only_the_tenants_board_is_empty_and_that_is_said() {
    let service = shared();
    let client = Client::with_scope(&service.place, "tenant-without-metrics", "runs");

    let dashboard = Dashboard::start(&client, &[]).unwrap();

    assert!(dashboard.said().contains("the tenant's board stays empty"), "{}", dashboard.said());
    look_until(&dashboard, "overview", |page| figure(page, "Nodes that take work") == "1").await;
    assert_eq!(figure(&dashboard.page("tenant").await, "Ends in this month"), "–");
}

#[tokio::test]
async fn root_needs_no_token_to_see_the_tenant_of_the_first_run() {
    let service = shared();
    let target = service::folder().unwrap();
    // As `make run` has built it.
    fs::create_dir(target.path().join("release")).unwrap();
    symlink(service::program("mayfly"), target.path().join("release/mayfly")).unwrap();
    let data_dir = service.place.data_dir.display().to_string();
    let environment = [("MAYFLY_TOKEN", ""), ("DATA_DIR", &data_dir), ("CARGO_TARGET_DIR", target.path().to_str().unwrap())];
    Client::of(&service.place, "demo").shell("true").await;

    let dashboard = Dashboard::start(&service.client(), &environment).unwrap();

    look_until(&dashboard, "tenant", |page| figure(page, "Ends in this month") != "–").await;
    assert!(!dashboard.said().contains("stays empty"), "{}", dashboard.said());
}
