//! The steps at which a process can be killed, as the sources have them: one that is added is tested.

use std::{fs, path::Path};

/// What the mixed load of these tests does not do: the keeper's own tests kill there.
const OF_KEEPERS_TESTS: &str = "keeper.volume.";

/// The names with which `fail_point::reached` is called in the sources and that begin with this.
pub(crate) fn steps(of: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut names = Vec::new();
    for folder in ["sandbox-core/src", "service/src"] {
        collect(&root.join(folder), &mut names);
    }
    names.retain(|name| name.starts_with(of) && !name.starts_with(OF_KEEPERS_TESTS));
    names.sort();
    names.dedup();
    assert!(!names.is_empty(), "no step begins with {of}");
    names
}

fn collect(folder: &Path, names: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("a folder can be read to its end").path();
        if path.is_dir() {
            collect(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("fail_point.rs") {
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            names.extend(text.split("reached(\"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
        }
    }
}
