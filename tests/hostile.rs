//! Layers of strangers who mean no good: each is refused with a reason or does no harm, and nothing is written outside of where it belongs; and good ones are unpacked as others unpack them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use flate2::{Compression, write::GzEncoder};
use mayfly_tests::{
    Answer, Client, image,
    outcome::{assert_exit, stdout},
    service::{self, import, shared},
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// What is refused for its size is refused long before all of it would have been unpacked.
const DEADLINE: Duration = Duration::from_secs(120);

fn header(kind: EntryType, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000);
    header.set_size(bytes);
    header
}

/// A header of exactly this name, which the library's own checks would refuse.
fn named(kind: EntryType, name: &str, link: &str, bytes: u64) -> Header {
    let mut header = header(kind, bytes);
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    header
}

/// A layer of these entries.
fn layer(entries: &[(EntryType, &str, &str, &[u8])]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, name, link, content) in entries {
        tar.append(&named(*kind, name, link, content.len() as u64), *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// An OCI archive with these layers over none, and what its manifest says of them.
fn archive(folder: &Path, layers: &[Vec<u8>], change: impl Fn(&mut Value)) -> PathBuf {
    let path = folder.join(format!("{}.tar", uuid::Uuid::new_v4()));
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let diffs: Vec<_> = layers.iter().map(|layer| digest_of(layer)).collect();
    let config = json!({
        "architecture": architecture, "os": "linux", "config": { "Cmd": ["true"] }, "rootfs": { "type": "layers", "diff_ids": diffs },
    });
    let config = config.to_string().into_bytes();
    let described = |bytes: &[u8], kind: &str| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest_of(bytes), "size": bytes.len() });
    let all: Vec<_> = layers
        .iter()
        .map(|layer| described(layer, if layer.starts_with(&[0x1f, 0x8b]) { "layer.v1.tar+gzip" } else { "layer.v1.tar" }))
        .collect();
    let mut manifest = json!({ "schemaVersion": 2, "config": described(&config, "config.v1+json"), "layers": all });
    change(&mut manifest);
    let manifest = manifest.to_string().into_bytes();
    let index = json!({ "schemaVersion": 2, "manifests": [described(&manifest, "manifest.v1+json")] }).to_string().into_bytes();
    let mut tar = Builder::new(File::create(&path).unwrap());
    let mut add =
        |name: &str, content: &[u8]| tar.append_data(&mut header(EntryType::Regular, content.len() as u64), name, content).unwrap();
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    add("index.json", &index);
    for blob in layers.iter().chain([&config, &manifest]) {
        add(&format!("blobs/{}", digest_of(blob).replace(':', "/")), blob);
    }
    tar.finish().unwrap();
    path
}

async fn upload(client: &Client, archive: &Path) -> Answer {
    let path = "/v1/images/import?reference=hostile";
    let answer = client.post_raw(path, "application/x-tar", fs::read(archive).unwrap());
    tokio::time::timeout(DEADLINE, answer).await.expect("it is refused soon")
}

/// Refused, with these words, and nothing of it is there.
async fn is_refused(layers: &[Vec<u8>], words: &str) {
    let (client, folder) = (shared().client(), service::folder().unwrap());

    let problem = upload(&client, &archive(folder.path(), layers, |_| {})).await.problem(422, "invalid_request");

    assert!(problem["detail"].as_str().unwrap().contains(words), "{problem:#}");
    client.get("/v1/images/hostile").await.problem(404, "image_not_found");
}

#[tokio::test]
async fn a_path_through_dots_is_refused() {
    is_refused(&[layer(&[(EntryType::Regular, "a/../../escaped", "", b"x")])], "..").await;
}

#[tokio::test]
async fn a_whiteout_of_dots_is_refused() {
    is_refused(&[layer(&[(EntryType::Regular, "a/.wh...", "", b"")])], "whiteout").await;
}

#[tokio::test]
async fn a_path_of_three_hundred_folders_is_refused() {
    let mut tar = Builder::new(Vec::new());
    let deep = "d/".repeat(300) + "file";
    tar.append_data(&mut header(EntryType::Regular, 1), deep, &b"x"[..]).unwrap();
    is_refused(&[tar.into_inner().unwrap()], "256 folders").await;
}

#[tokio::test]
async fn a_name_of_more_than_a_name_can_have_is_refused() {
    let mut tar = Builder::new(Vec::new());
    tar.append_data(&mut header(EntryType::Regular, 1), "n".repeat(300), &b"x"[..]).unwrap();
    is_refused(&[tar.into_inner().unwrap()], "255 bytes").await;
}

#[tokio::test]
async fn an_owner_that_no_sandbox_has_is_refused() {
    let mut owned = named(EntryType::Regular, "file", "", 0);
    owned.set_uid(70_000);
    owned.set_cksum();
    let mut tar = Builder::new(Vec::new());
    tar.append(&owned, &b""[..]).unwrap();
    is_refused(&[tar.into_inner().unwrap()], "70000").await;
}

#[tokio::test]
async fn ten_gigabytes_of_zeros_in_ten_megabytes_are_refused_before_they_fill_a_disk() {
    const ZEROS: u64 = 64 << 20;
    let member = gzip(&vec![0; usize::try_from(ZEROS).unwrap()]);
    let mut packed = gzip(named(EntryType::Regular, "zeros", "", 160 * ZEROS).as_bytes());
    // What is packed in pieces is unpacked as one (RFC 1952, 2.2).
    for _ in 0..160 {
        packed.extend_from_slice(&member);
    }
    packed.extend(gzip(&[0; 1024]));
    assert!(packed.len() < 16 << 20, "{} bytes", packed.len());
    is_refused(&[packed], "more than").await;
}

#[tokio::test]
async fn more_entries_than_an_image_may_have_are_refused() {
    // Devices, which are left out: only their number is any work.
    let entry = named(EntryType::Char, "again", "", 0).as_bytes().repeat(10_001);
    let packed = gzip(&entry).repeat(100);
    is_refused(&[packed], "entries").await;
}

#[tokio::test]
async fn a_layer_that_is_cut_short_is_refused() {
    let whole = layer(&[(EntryType::Regular, "file", "", &[7; 4096])]);
    let packed = gzip(&whole);
    is_refused(&[packed[..packed.len() / 2].to_vec()], "layer").await;
    is_refused(&[whole[..1024].to_vec()], "layer").await;
}

#[tokio::test]
async fn a_layer_of_another_size_or_digest_than_its_manifest_says_is_refused() {
    let (client, folder) = (shared().client(), service::folder().unwrap());
    let layers = [layer(&[(EntryType::Regular, "file", "", b"x")])];

    let size = archive(folder.path(), &layers, |manifest| manifest["layers"][0]["size"] = json!(7));
    let digest = archive(folder.path(), &layers, |manifest| manifest["layers"][0]["digest"] = json!(format!("sha256:{}", "0".repeat(64))));

    let size = upload(&client, &size).await.problem(422, "invalid_request");
    let digest = upload(&client, &digest).await.problem(422, "invalid_request");
    assert!(size["detail"].as_str().unwrap().contains("7 by its descriptor"), "{size:#}");
    assert!(digest["detail"].as_str().unwrap().contains("lacks"), "{digest:#}");
}

#[tokio::test]
async fn of_two_names_in_one_extended_header_neither_leads_outside() {
    // A record is its own length in decimal, a blank, and what it says (pax(1)).
    let record = |key: &str, value: &str| {
        let rest = format!(" {key}={value}\n");
        let len = (1..=4).map(|digits| rest.len() + digits).find(|len| len.to_string().len() + rest.len() == *len).unwrap();
        format!("{len}{rest}")
    };
    let names = record("path", "good") + &record("path", "../../../../tmp/bad");
    let entries: [(EntryType, &str, &str, &[u8]); 2] =
        [(EntryType::XHeader, "header", "", names.as_bytes()), (EntryType::Regular, "plain", "", b"x")];
    let (client, folder) = (shared().client(), service::folder().unwrap());

    let answer = upload(&client, &archive(folder.path(), &[layer(&entries)], |_| {})).await;

    assert!(answer.status == 422 || answer.status == 201, "{}", answer.text);
    assert!(!Path::new("/tmp/bad").exists());
}

/// What of it is there, by a program of a sandbox's.
const TELL: &str = "{ find . ! -type d | sort | while IFS= read -r name; do stat -c '%n %F %a %u:%g %h %s %Y' \"$name\"; done
    find . -type d | sort | while IFS= read -r name; do stat -c '%n %F %a %u:%g %Y' \"$name\"; done
    find . -type f | sort | while IFS= read -r name; do md5sum \"$name\"; done
    find . -type l | sort | while IFS= read -r name; do readlink \"$name\"; done; } | cat -v";

/// Those of all that is below this folder, but what the host itself may put on every file.
fn extended_attributes(folder: &Path) -> String {
    let tell = "import os\nfor at, folders, files in os.walk('.'):
        for path in sorted([at] + [os.path.join(at, name) for name in files if not os.path.islink(os.path.join(at, name))]):
            for name in sorted(os.listxattr(path)):
                if name != 'security.selinux': print(ascii(path), name, os.getxattr(path, name))";
    let output = Command::new("sh").args(["-c", "python3 -c \"$1\" | sort", "sh", tell]).current_dir(folder).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn what_is_unpacked_is_what_umoci_unpacks() {
    let (service, folder) = (shared(), service::folder().unwrap());
    let (layout, first, second) = (folder.path().join("layout"), folder.path().join("first"), folder.path().join("second"));
    image::unpack_layout(&image::archive("busybox").unwrap(), &layout).unwrap();
    let script = "set -e
        mkdir -p $1/data/deep/deeper $1/data/opaque $1/data/replaced; cd $1/data
        echo one > file; chown 1000:1001 file; chmod 4755 file; ln file same; ln file deep/same; ln -s ../file deep/link; ln -s /etc/passwd absolute
        echo gone > gone; echo below > opaque/below; echo below > replaced/below; mkfifo pipe; chmod 622 pipe; truncate -s 1M sparse
        python3 -c 'import os; os.setxattr(\"file\", \"user.note\", b\"of a file\"); os.setxattr(\"deep\", \"user.note\", b\"of a folder\")'
        chmod 1770 deep; chown 5:6 deep/deeper; touch -d '2020-01-02 03:04:05' file deep; echo x > \"$(printf 'odd name\\377')\"
        mkdir -p $2/data/opaque; cd $2/data; : > .wh.gone; : > opaque/.wh..wh..opq; echo above > opaque/above; echo a file now > replaced
        touch -d '2021-01-02 03:04:05' opaque replaced .";
    image::run(Command::new("sh").args(["-c", script, "sh"]).args([&first, &second])).unwrap();
    for content in [&first, &second] {
        let tar = content.with_extension("tar");
        image::run(
            Command::new("tar").args(["--xattrs", "--xattrs-include=user.*"]).arg("-C").arg(content).arg("-cf").arg(&tar).arg("data"),
        )
        .unwrap();
        let image = format!("{}:latest", layout.display());
        image::run(Command::new("umoci").args(["raw", "add-layer", "--image", &image]).arg(&tar)).unwrap();
    }
    let (name, root) = (format!("test-{}", uuid::Uuid::new_v4().simple()), folder.path().join("root"));
    import(&service.place, &layout, &name).unwrap();
    image::unpack_root(&layout, &root).unwrap();

    let theirs = Command::new("/bin/busybox").args(["sh", "-c", TELL]).current_dir(root.join("data")).output().unwrap();
    let request = json!({ "image": name, "command": ["sh", "-c", format!("cd /data; {TELL}")], "capabilities": "root_image" });
    let ours = service.client().run(&request).await;

    assert_exit(&ours, 0);
    let theirs = String::from_utf8_lossy(&theirs.stdout).into_owned();
    assert!(theirs.contains("./file regular file 4755 1000:1001 3") && !theirs.contains("gone") && !theirs.contains("below"), "{theirs}");
    assert_eq!(stdout(&ours), theirs);
    // What BusyBox cannot read, where it lies.
    let unpacked = service.place.data_dir.join("images").join(ours["image"]["digest"].as_str().unwrap().trim_start_matches("sha256:"));
    let (ours, theirs) = (extended_attributes(&unpacked.join("data")), extended_attributes(&root.join("data")));
    assert!(theirs.contains("of a file") && theirs.contains("of a folder"), "{theirs}");
    assert_eq!(ours, theirs);
}
