//! Files of this machine that a sandbox is to begin with.

use std::{fs, io::Read as _, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};

/// A request has 16 MiB; base64 takes a third more.
const BYTES_MAX: u64 = 11 << 20;

/// What `files` of a request says, from `SOURCE:PATH` and `SOURCE`. A folder is all the files in it.
pub(super) fn read(sources: &[String]) -> anyhow::Result<Vec<Value>> {
    let mut files = Vec::new();
    let mut left = BYTES_MAX;
    for source in sources {
        let (source, path) = split(source)?;
        add(Path::new(&source), &path, &mut files, &mut left)?;
    }
    Ok(files)
}

/// Here and there. What ends in a slash there is the folder for it.
fn split(text: &str) -> anyhow::Result<(String, String)> {
    let (source, path) = text.rsplit_once(':').unwrap_or((text, ""));
    ensure!(!source.is_empty(), "--file {text}: a file of this machine is needed before the colon");
    let name = || Path::new(source).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let path = if path.is_empty() || path.ends_with('/') { format!("{path}{}", name()) } else { path.to_owned() };
    ensure!(!path.is_empty() && !path.ends_with('/'), "--file {text}: a path is needed behind a colon");
    Ok((source.to_owned(), path))
}

fn add(source: &Path, path: &str, files: &mut Vec<Value>, left: &mut u64) -> anyhow::Result<()> {
    let shown = || format!("--file {}", source.display());
    let meta = fs::metadata(source).with_context(shown)?;
    if meta.is_dir() {
        let mut entries: Vec<_> = fs::read_dir(source).with_context(shown)?.collect::<Result<_, _>>().with_context(shown)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            add(&entry.path(), &format!("{path}/{}", entry.file_name().to_string_lossy()), files, left)?;
        }
        return Ok(());
    }
    ensure!(meta.is_file(), "{} is neither a file nor a folder", source.display());
    let too_much = || {
        let most = BYTES_MAX >> 20;
        format!("{}: that is too much for a request, which holds {most} MiB; `mayfly cp` takes more, once the sandbox is there", shown())
    };
    let mut content = Vec::new();
    // No more of it is read than there may be.
    fs::File::open(source).and_then(|file| file.take(*left + 1).read_to_end(&mut content)).with_context(shown)?;
    *left = left.checked_sub(content.len() as u64).with_context(too_much)?;
    files.push(json!({
        "path": path,
        "content": BASE64.encode(content),
        "encoding": "base64",
        "mode": format!("{:04o}", meta.mode() & 0o777),
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_a_place_with_or_without_a_word_about_it() {
        assert_eq!(split("a/main.py:/work/m.py").unwrap(), ("a/main.py".into(), "/work/m.py".into()));
        assert_eq!(split("a/main.py").unwrap(), ("a/main.py".into(), "main.py".into()));
        assert_eq!(split("a/main.py:/work/").unwrap(), ("a/main.py".into(), "/work/main.py".into()));
        assert!(split(":/work").is_err());
    }

    #[test]
    fn a_folder_is_all_its_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("deep")).unwrap();
        fs::write(folder.path().join("deep/b"), "bb").unwrap();
        fs::write(folder.path().join("a"), "a").unwrap();

        let files = read(&[format!("{}:/in", folder.path().display())]).unwrap();

        let told: Vec<_> = files.iter().map(|file| (file["path"].as_str().unwrap(), file["content"].as_str().unwrap())).collect();
        assert_eq!(told, [("/in/a", "YQ=="), ("/in/deep/b", "YmI=")]);
        assert_eq!(files[0]["mode"].as_str().unwrap().len(), 4);
    }

    #[test]
    fn what_is_not_there_or_too_much_is_named() {
        assert!(read(&["/no/such/file".into()]).unwrap_err().to_string().contains("/no/such/file"));
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(BYTES_MAX + 1).unwrap();
        assert!(read(&[file.path().display().to_string()]).unwrap_err().to_string().contains("mayfly cp"));
    }
}
