//! What the documents name is there: pages and headings that they link to, files, commands of `make`, our programs and their settings.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "documents/markdown.rs"]
mod markdown;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use markdown::Page;
use mayfly_tests::service::program;

/// Whose fences for a shell tests/docs.rs types.
const TYPED: [&str; 4] = ["README.md", "docs/api.md", "docs/operations.md", "docs/performance.md"];

/// Settings of `runsc`, gVisor's program, that are named.
const FOREIGN_SETTINGS: [&str; 3] = ["--build-arg", "--network", "--platform"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Every document, by its path from the root. What was will not be made true: the changelog stays as it is.
static PAGES: LazyLock<BTreeMap<String, Page>> = LazyLock::new(|| {
    let root = root();
    let folders = ["", "docs", "docs/adr", "helm"].map(|folder| root.join(folder));
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path());
    let documents = files.filter(|path| path.extension().is_some_and(|extension| extension == "md") && !path.ends_with("CHANGELOG.md"));
    documents
        .map(|path| (path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(), Page::of(&fs::read_to_string(&path).unwrap())))
        .collect()
});

/// What stands between backticks in all documents, each with its place.
fn code() -> impl Iterator<Item = (String, &'static str)> {
    PAGES.iter().flat_map(|(name, page)| page.code.iter().map(move |(line, code)| (format!("{name}:{line}"), code.as_str())))
}

#[track_caller]
fn assert_none(faults: &[String]) {
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_link_leads_to_a_file_or_heading_that_is_there() {
    let root = root();
    let mut faults = Vec::new();
    let mut looked_at = 0;
    for (name, page) in &*PAGES {
        let folder = Path::new(name).parent().unwrap();
        for (line, link) in page.links.iter().filter(|(_, link)| !link.contains("://")) {
            looked_at += 1;
            let (file, anchor) = link.split_once('#').map_or((link.as_str(), None), |(file, anchor)| (file, Some(anchor)));
            let path = if file.is_empty() { root.join(name) } else { root.join(folder).join(file) };
            let Ok(path) = path.canonicalize() else {
                faults.push(format!("{name}:{line}: {link} is not there"));
                continue;
            };
            let target = path.strip_prefix(&root).unwrap().to_str().unwrap();
            if let Some(anchor) = anchor
                && !PAGES.get(target).is_some_and(|page| page.anchors.iter().any(|there| there == anchor))
            {
                faults.push(format!("{name}:{line}: {target} has no heading #{anchor}"));
            }
        }
    }
    assert!(looked_at > 40, "{looked_at}");
    assert_none(&faults);
}

#[test]
fn every_file_that_is_named_by_its_path_is_there() {
    let root = root();
    let folders =
        ["docs/", "fuzz/", "helm/", "images/", "loadtest/", "migrations/", "sandbox-core/", "service/", "systemd/", "tests/", "tools/"];
    let is_path = |code: &str| {
        let is_whole = !code.contains([' ', '*', '{', '…', '<']);
        is_whole && folders.iter().any(|folder| code.starts_with(folder))
    };
    let named: Vec<_> = code().filter(|(_, code)| is_path(code)).collect();
    assert!(named.len() > 30, "{}", named.len());
    let faults: Vec<_> =
        named.iter().filter(|(_, path)| !root.join(path).exists()).map(|(place, path)| format!("{place}: {path}")).collect();
    assert_none(&faults);
}

#[test]
fn what_is_for_a_shell_stands_only_where_it_is_typed() {
    let others = PAGES.iter().filter(|(name, _)| !TYPED.contains(&name.as_str()));
    let commands = |(name, page): (&String, &Page)| -> Vec<String> {
        page.fences
            .iter()
            .filter(|(_, language)| matches!(language.as_str(), "sh" | "bash" | ""))
            .map(|(line, _)| format!("{name}:{line}"))
            .collect()
    };
    let faults: Vec<_> = others.flat_map(commands).collect();
    assert!(faults.is_empty(), "to be typed by tests/docs.rs, or no commands and said so: {faults:#?}");
}

#[test]
fn every_command_of_make_that_is_named_is_in_the_makefile() {
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let targets: BTreeSet<&str> = makefile.lines().filter_map(|line| line.split_once(": ## ")).map(|(target, _)| target).collect();
    let named: Vec<_> = code().filter_map(|(place, code)| Some((place, code.strip_prefix("make ")?.split(' ').next()?))).collect();
    assert!(named.len() > 10, "{named:?}");
    let faults: Vec<_> =
        named.iter().filter(|(_, target)| !targets.contains(target)).map(|(place, target)| format!("{place}: make {target}")).collect();
    assert_none(&faults);
}

/// What a command of one of our programs says of itself, by its words: `mayfly image pull`.
static HELP: LazyLock<BTreeMap<String, String>> = LazyLock::new(|| {
    let mut told = BTreeMap::new();
    for name in ["mayfly", "sandbox-keeper", "loadtest"] {
        read_help(vec![name.to_owned()], &mut told);
    }
    told
});

/// Asks this command, and those below it.
fn read_help(words: Vec<String>, told: &mut BTreeMap<String, String>) {
    let output = Command::new(program(&words[0])).args(&words[1..]).arg("--help").output().unwrap();
    assert!(output.status.success(), "{words:?} --help");
    let help = String::from_utf8(output.stdout).unwrap();
    let below = help.split_once("\nCommands:\n").map_or("", |(_, rest)| rest.split_once("\n\n").map_or(rest, |(commands, _)| commands));
    for name in below.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help") {
        read_help([words.as_slice(), &[name.to_owned()]].concat(), told);
    }
    told.insert(words.join(" "), help);
}

/// Whether this help has this setting, as a word of its own.
fn has(help: &str, setting: &str) -> bool {
    help.split(|sign: char| sign.is_whitespace() || matches!(sign, ',' | '=' | '[' | ']')).any(|word| word == setting)
}

/// The settings that a command line names, up to where another's begins.
fn settings(line: &str) -> impl Iterator<Item = &str> {
    line.split_whitespace()
        .take_while(|word| *word != "--")
        .filter(|word| word.starts_with("--"))
        .map(|word| word.split('=').next().unwrap())
}

#[test]
fn every_command_of_ours_that_is_named_is_there_with_its_settings() {
    let mut faults = Vec::new();
    let mut looked_at = 0;
    for (place, code) in code() {
        let mut words = code.split_whitespace();
        let Some(program) = words.next().filter(|word| matches!(*word, "mayfly" | "sandbox-keeper")) else { continue };
        looked_at += 1;
        let mut command = program.to_owned();
        for word in words {
            let longer = format!("{command} {word}");
            if !HELP.contains_key(&longer) {
                break;
            }
            command = longer;
        }
        // One that has others below it does nothing without one of those.
        let rest = code[command.len()..].trim();
        if HELP[&command].contains("\nCommands:\n") && !rest.is_empty() && !rest.starts_with('-') {
            faults.push(format!("{place}: {command} has no {rest}"));
        }
        faults.extend(
            settings(rest).filter(|setting| !has(&HELP[&command], setting)).map(|setting| format!("{place}: {command} has no {setting}")),
        );
    }
    assert!(looked_at > 20, "{looked_at}");
    assert_none(&faults);
}

#[test]
fn every_setting_that_is_named_is_one_of_ours() {
    let named: Vec<_> = code().filter(|(_, code)| code.starts_with("--")).collect();
    assert!(named.len() > 100, "{}", named.len());
    let is_known = |setting: &str| FOREIGN_SETTINGS.contains(&setting) || HELP.values().any(|help| has(help, setting));
    let faults: Vec<_> = named
        .iter()
        .flat_map(|(place, code)| settings(code).map(move |setting| (place, setting)))
        .filter(|(_, setting)| !is_known(setting))
        .map(|(place, setting)| format!("{place}: {setting}"))
        .collect();
    assert_none(&faults);
}

#[test]
fn every_unit_that_is_named_is_one_of_ours() {
    let asked = code().filter(|(_, code)| code.starts_with("systemctl ") || code.starts_with("journalctl -u "));
    let units: Vec<_> = asked.filter_map(|(place, code)| Some((place, code.split(' ').nth(2)?))).collect();
    assert!(units.len() > 5, "{units:?}");
    let systemd = root().join("systemd");
    let faults: Vec<_> = units
        .iter()
        .filter(|(_, unit)| !systemd.join(format!("{unit}.service")).exists())
        .map(|(place, unit)| format!("{place}: {unit}"))
        .collect();
    assert_none(&faults);
}
