//! The image of a node: what is in it, that it is the same each time it is built, and that its programs run from it as the chart's containers.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    process::Command,
    time::Duration,
};

use mayfly_tests::{
    node_image::{self, build, unpack},
    service::{self, finish},
};
use serde_json::{Value, json};

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A blob of a layout.
fn blob(layout: &Path, descriptor: &Value) -> Value {
    json_of(&layout.join("blobs").join(descriptor["digest"].as_str().unwrap().replace(':', "/")))
}

#[test]
fn the_image_is_the_same_to_the_byte_when_it_is_built_again() {
    let folder = service::folder().unwrap();
    let manifests: Vec<Value> = ["first", "second"]
        .into_iter()
        .map(|name| {
            let archive = folder.path().join(name);
            build(&archive).unwrap();
            let layout = folder.path().join(format!("{name}.layout"));
            unpack(&archive, &layout, &folder.path().join(format!("{name}.root"))).unwrap();
            let manifest = &json_of(&layout.join("index.json"))["manifests"][0];
            blob(&layout, manifest)
        })
        .collect();

    assert_eq!(manifests[0], manifests[1]);
    let layout = folder.path().join("first.layout");
    let config = blob(&layout, &manifests[0]["config"]);
    assert_eq!(config["created"], "2023-11-14T22:13:20Z", "SOURCE_DATE_EPOCH of the harness");
    assert_eq!(config["config"]["User"], "10001:10001");
    assert_eq!((&config["config"]["Entrypoint"], &config["config"]["Cmd"]), (&json!(["mayfly"]), &json!(["serve"])));
}

#[test]
fn every_program_of_a_node_starts_from_it_as_whoever_the_container_is() {
    let root = node_image::root().unwrap();
    let run = |user: &str, words: &[&str]| {
        // A keeper looks for its other programs beside its own, which /proc knows.
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork"]).arg(format!("--mount-proc={}", root.join("proc").display())).arg("chroot");
        command
            .arg(&root)
            .args(["setpriv", user, "--regid=10001", "--clear-groups", "--bounding-set=-all", "--no-new-privs", "--"])
            .args(words);
        finish(command.env_clear().env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), Duration::from_secs(30)).unwrap()
    };

    let (status, said) = run("--reuid=10001", &["mayfly", "--version"]);
    assert!(status.success() && said.contains(env!("CARGO_PKG_VERSION")), "{said}");
    let (status, said) = run("--reuid=0", &["sandbox-keeper", "--help"]);
    assert!(status.success() && said.contains("--socket"), "{said}");
    for program in ["sandbox-init", "sandbox-unpack"] {
        let mode = fs::metadata(root.join("usr/local/bin").join(program)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "{program}");
    }
    for helper in ["mke2fs", "setpriv", "apparmor_parser"] {
        let (status, said) = run("--reuid=0", &["which", helper]);
        assert!(status.success(), "{helper}: {said}");
    }
}

#[test]
fn it_holds_nothing_of_the_machine_that_built_it_and_no_way_to_more_rights_than_debians_own() {
    let root = node_image::root().unwrap();
    let mut next = vec![root.clone()];
    let (mut raised, mut ours) = (BTreeSet::new(), BTreeSet::new());
    while let Some(folder) = next.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            let meta = entry.path().symlink_metadata().unwrap();
            let name = entry.path().strip_prefix(&root).unwrap().display().to_string();
            if meta.is_dir() {
                next.push(entry.path());
            } else if meta.is_file() && meta.mode() & 0o6000 != 0 {
                raised.insert(name.clone());
            }
            if name.starts_with("usr/local/") && meta.is_file() {
                ours.insert(name);
            }
        }
    }

    // Nobody gains by these: no container but the keeper's may gain privileges (`allowPrivilegeEscalation: false`).
    assert!(
        raised.iter().all(|name| name.starts_with("usr/bin/") || name.starts_with("usr/sbin/") || name.starts_with("bin/")),
        "{raised:?}"
    );
    let expected = ["mayfly", "sandbox-init", "sandbox-keeper", "sandbox-unpack"].map(|name| format!("usr/local/bin/{name}"));
    assert_eq!(ours.into_iter().collect::<Vec<_>>(), expected);
    // Where a runtime puts its own, there is an empty place at the most.
    for of_the_machine in ["etc/apt/sources.list", "etc/hostname", "etc/hosts", "etc/resolv.conf"] {
        assert_eq!(fs::read_to_string(root.join(of_the_machine)).unwrap_or_default(), "", "{of_the_machine}");
    }
    let users = fs::read_to_string(root.join("etc/passwd")).unwrap();
    assert!(users.contains("mayfly:x:10001:10001:"), "{users}");
}

/// What the Dockerfile's first stage builds from: the build itself takes a compiler's image and minutes, and is `make build`'s.
#[test]
fn what_the_first_stage_is_given_is_all_that_cargo_asks_for() {
    let folder = service::folder().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    let store = folder.path().join("store");
    let buildah = |words: &[&str]| {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(&store).arg("--runroot").arg(folder.path().join("run")).args(["--storage-driver", "vfs"]).args(words);
        let (status, said) = finish(&mut command, Duration::from_secs(120)).unwrap();
        assert!(status.success(), "{words:?}: {said}");
        said
    };
    let recipe = folder.path().join("Dockerfile");
    fs::write(&recipe, "FROM scratch\nCOPY . .\n").unwrap();
    let ignored = source.join(".dockerignore");
    let words = [
        "build",
        "--quiet",
        "--ignorefile",
        ignored.to_str().unwrap(),
        "--tag",
        "context",
        "--file",
        recipe.to_str().unwrap(),
        source.to_str().unwrap(),
    ];
    buildah(&words);
    let container = buildah(&["from", "--pull=never", "context"]).lines().last().unwrap().to_owned();
    let context = buildah(&["mount", &container]).lines().last().unwrap().to_owned();

    let mut metadata = Command::new("cargo");
    metadata
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--no-deps", "--quiet"])
        .current_dir(&context)
        .env_remove("RUSTUP_TOOLCHAIN");
    let (status, said) = finish(&mut metadata, Duration::from_secs(60)).unwrap();
    assert!(status.success(), "{said}");
    for part in [
        "migrations",
        ".sqlx",
        "tools/rustc-wrapper.sh",
        "rust-toolchain.toml",
        "LICENSE",
        "service/src/main.rs",
        "sandbox-core/src/apparmor/mayfly-sandbox",
    ] {
        assert!(Path::new(&context).join(part).exists(), "{part}");
    }
    for other in ["target", ".git", "docs"] {
        assert!(!Path::new(&context).join(other).exists(), "{other} is nothing that programs are made of");
    }
}
