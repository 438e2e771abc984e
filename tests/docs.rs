//! What the documents say that can be typed works, and prints what they show.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "docs/block.rs"]
mod block;
#[path = "documents/markdown.rs"]
mod markdown;
#[path = "docs/tool.rs"]
mod tool;

use std::path::Path;

use block::{Block, EXAMPLES, blocks, is_shown};
use markdown::Page;
use mayfly_tests::{
    Client, Service, chart,
    service::{Place, shared},
};
use tool::{Desk, beside_programs};

/// Documents of which every command for a shell is typed.
const TYPED: [&str; 3] = ["README.md", "docs/operations.md", "docs/performance.md"];

/// Where documents say that a service is.
const PLACE: &str = "http://127.0.0.1:8080";

fn document(name: &str) -> Vec<Block> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    blocks(&std::fs::read_to_string(path).unwrap())
}

/// Runs the examples of `docs/api.md` in this language, each as a tenant of its own; all that is not as the page has it.
#[track_caller]
fn check(language: &str) {
    let shared = shared();
    let examples: Vec<Block> = document("docs/api.md").into_iter().filter(|block| block.language == language).collect();
    assert!(!examples.is_empty());
    let faults: Vec<String> = examples.iter().filter_map(|example| fault(example, &shared.place)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn fault(example: &Block, place: &Place) -> Option<String> {
    let Block { line, language, text, output } = example;
    let client = place.client();
    let data_dir = place.data_dir.display().to_string();
    let variables = [("MAYFLY_URL", place.url.as_str()), ("MAYFLY_TOKEN", client.token().unwrap()), ("MAYFLY_DATA_DIR", data_dir.as_str())];
    let said = Desk::new(&variables).run(language, &text.replace(PLACE, &place.url));
    let shown = output.as_deref().unwrap_or_default();
    match said {
        Ok(said) if is_shown(shown, &said) => None,
        Ok(said) => Some(format!("docs/api.md:{line} printed\n{said}\nand shows\n{shown}")),
        Err(failure) => Some(format!("docs/api.md:{line}: {failure}")),
    }
}

#[test]
fn examples_by_curl_print_what_the_page_shows() {
    check("sh");
}

#[test]
fn examples_in_python_print_what_the_page_shows() {
    check("python");
}

#[test]
fn examples_in_typescript_have_sound_types_and_print_what_the_page_shows() {
    check("ts");
}

#[test]
fn nothing_between_fences_of_the_examples_is_left_untried() {
    let others: Vec<_> = document("docs/api.md")
        .into_iter()
        .filter(|block| !EXAMPLES.contains(&block.language.as_str()) || block.output.is_none())
        .map(|block| format!("docs/api.md:{}: {}", block.line, block.language))
        .collect();
    assert!(others.is_empty(), "no example with its output: {others:#?}");
}

/// What is not typed here: how it begins, and what shows that it works.
const ELSEWHERE: [(&str, &str); 7] = [
    ("make run", "its recipe is run with `make -n` below; a build and a service of the whole machine are nothing for a test"),
    (
        "make image",
        "tests/container.rs: the same script, with the programs of this build; and the second line asks a registry of the world",
    ),
    ("make dashboard", "tests/dashboard.rs: all that its recipe does"),
    ("runuser -u mayfly -- pg_", "tests/backup.rs: on a machine that is gone afterwards, and on another one"),
    ("install -m 755", "tests/units.rs: what systemd says of the units"),
    ("curl -sS http://127.0.0.1:8080/v1/images/pull", "tests/pull.rs: this asks a registry of the world"),
    ("pip install openapi-python-client", "tests/sdk.rs: the generator in the version that is pinned"),
];

/// Commands at a terminal get one, what never ends gets an end; of what serves or asks registries of the world only the flags are looked at. What the API refuses is a failure of curl's, too.
/// What cargo would build for a measurement is there already, not optimised, and puts little load on. Of all services only ours is looked at, and not for long, while it has something to do.
/// There is no cluster: what helm is told is rendered by its engine, and what kubectl names must be in that.
const STAND_INS: &str = r#"
DATABASE_URL=postgres://somebody@127.0.0.1/none
helm() { "$TYPED_PYTHON" "$TYPED" helm "$@"; }
kubectl() { "$TYPED_PYTHON" "$TYPED" kubectl "$@"; }
curl() { command curl --fail-with-body "$@"; }
cargo() {
    [[ "${*:1:5}" == 'run --release --package loadtest --' ]]
    local words=" ${*:6} "
    words=${words/ --rate 50 / --rate 5 }
    words=${words/ --p99-ms 50 / --p99-ms 60000 }
    read -ra words <<<"$words --duration-s 2"
    loadtest "${words[@]}"
}
pgrep() { command pgrep "$1" "$2" "$MAYFLY_DATA_DIR"; }
perf() {
    [[ $1 == record ]] || { command perf "$@"; return; }
    local words=("${@/%499/49}") ended=0 load
    words[-1]=1
    while :; do command mayfly run busybox true; done >/dev/null &
    load=$!
    command perf "${words[@]}" || ended=$?
    kill "$load"
    return "$ended"
}
inferno-collapse-perf() { "$INFERNO/inferno-collapse-perf"; }
inferno-flamegraph() { "$INFERNO/inferno-flamegraph"; }
mayfly() {
    case "$*" in
    *' -it '*) script -qec "mayfly $*" /dev/null <<<exit ;;
    'logs -f '*) timeout 5 mayfly "$@" || (($? == 124)) ;;
    'serve '* | 'pull '*) command mayfly "$@" --help >/dev/null ;;
    *) command mayfly "$@" ;;
    esac
}
"#;

/// The file of values that `docs/operations.md` shows.
fn values() -> String {
    let blocks = document("docs/operations.md");
    blocks.into_iter().find(|block| block.text.starts_with("# mayfly.yaml\n")).unwrap().text
}

/// What a reader has at hand who comes to this block.
fn prepared(block: &Block, place: &Place, desk: &Desk) -> String {
    desk.put("main.py", "print(int(input()) ** 2)");
    desk.put("page.html", "<p>hello\n");
    desk.put("mayfly.yaml", &values());
    let mut before = STAND_INS.to_owned();
    if block.text.contains("$ID") {
        before += "ID=$(command mayfly run -d python sleep 1000)\n";
    }
    if block.text.contains("NODE") {
        before += "NODE=$(command mayfly node list | grep -oE '[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}' | sed -n 1p)\n";
    }
    // The token is there; shells keep their completions elsewhere here.
    let lines = block.text.lines().filter(|line| !line.starts_with("export MAYFLY_TOKEN="));
    let text: Vec<String> =
        lines.map(|line| line.replace(PLACE, &place.url).replace("/etc/bash_completion.d/", "./").replace(" NODE", " \"$NODE\"")).collect();
    before + &text.join("\n")
}

/// Types all that these documents have for a shell, as whom it is meant for; all that fails.
#[track_caller]
fn type_all(name: &str, service: &Service) {
    let (user, admin) = (service.client(), Client::admin(service.place()));
    let place = service.place();
    let mut faults = Vec::new();
    for block in document(name) {
        if block.language != "sh" || ELSEWHERE.iter().any(|(begin, _)| block.text.starts_with(begin)) {
            continue;
        }
        let is_for_operators = ["mayfly tenant", "mayfly node"].iter().any(|command| block.text.contains(command));
        let token = if is_for_operators { admin.token() } else { user.token() };
        let typed = Path::new(env!("CARGO_MANIFEST_DIR")).join("helm/typed.py");
        let (typed, python) = (typed.display().to_string(), chart::python().display().to_string());
        let (data_dir, inferno) = (place.data_dir.display().to_string(), beside_programs("inferno/bin").display().to_string());
        let desk = Desk::new(&[
            ("MAYFLY_URL", place.url.as_str()),
            ("MAYFLY_DATA_DIR", data_dir.as_str()),
            ("INFERNO", inferno.as_str()),
            ("MAYFLY_TOKEN", token.unwrap()),
            ("TYPED", typed.as_str()),
            ("TYPED_PYTHON", python.as_str()),
        ]);
        let said = desk.run("sh", &prepared(&block, place, &desk));
        match (&said, &block.output) {
            (Err(failure), _) => faults.push(format!("{name}:{}: {failure}", block.line)),
            (Ok(said), Some(shown)) if !is_shown(shown, said) => {
                faults.push(format!("{name}:{} printed\n{said}\nand shows\n{shown}", block.line));
            }
            (Ok(_), _) => {}
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn what_the_readme_has_for_a_shell_works() {
    let service = Service::start_with(&[]).expect("the service starts");
    for image in ["busybox", "python", "gcc"] {
        service.import(image).expect("the image is imported");
    }
    type_all("README.md", &service);
}

#[test]
fn what_operators_are_told_to_type_works() {
    type_all("docs/operations.md", &Service::start());
}

#[test]
fn what_is_said_of_measuring_works() {
    let service = Service::start();
    for image in ["python", "node", "gcc"] {
        service.import(image).expect("the image is imported");
    }
    type_all("docs/performance.md", &service);
}

#[test]
fn what_runbooks_ask_of_other_programs_is_answered() {
    /// What begins so is asked of another program than ours; `iostat` of Debian's sysstat goes on until it is interrupted.
    const OTHERS: [&str; 4] = ["curl ", "promtool ", "select ", "ss "];
    let place = shared().place;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = Page::of(&std::fs::read_to_string(root.join("docs/operations.md")).unwrap());
    let asked: Vec<_> = page.code.into_iter().filter(|(_, code)| OTHERS.iter().any(|other| code.starts_with(other))).collect();
    assert!(asked.len() >= OTHERS.len(), "{asked:?}");
    let mut faults = Vec::new();
    for (line, code) in asked {
        let typed = if code.starts_with("select ") {
            let postgres = place.data_dir.join("postgres/run");
            format!("cd / && runuser -u mayfly -- psql -h {} -d mayfly -c \"{code}\"", postgres.display())
        } else {
            let boards = root.join("helm/dashboards");
            format!(
                "cd {} && {}",
                boards.display(),
                code.replace("http://NODE:9464", &place.metrics_url).replace("curl ", "curl -sS --fail ")
            )
        };
        if let Err(failure) = Desk::new(&[]).run("sh", &typed) {
            faults.push(format!("docs/operations.md:{line}: {code}: {failure}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn what_make_is_asked_for_it_knows() {
    let asked: Vec<String> = TYPED
        .iter()
        .flat_map(|name| document(name))
        .flat_map(|block| block.text.lines().filter(|line| line.starts_with("make ")).map(ToOwned::to_owned).collect::<Vec<_>>())
        .collect();
    assert!(asked.contains(&"make run".to_owned()), "{asked:?}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for line in asked {
        let words = line.split_whitespace().skip(1);
        let output = std::process::Command::new("make").arg("-n").args(words).current_dir(&root).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn every_fence_says_what_stands_behind_it() {
    let silent: Vec<_> = TYPED
        .into_iter()
        .flat_map(|name| document(name).into_iter().map(move |block| (name, block)))
        .filter(|(_, block)| block.language.is_empty())
        .map(|(name, block)| format!("{name}:{}", block.line))
        .collect();
    assert!(silent.is_empty(), "sh, or text for what is no command: {silent:#?}");
}
