//! Good layers and hostile ones, unpacked into a folder with a secret beside it.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt},
};

use tar::{Builder, Header};

use super::*;

const BOUNDS: Bounds = Bounds { bytes: 1 << 20, entries: 100 };

struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// Adds an entry with exactly this path, which the tar crate's own checks would refuse.
    fn raw(mut self, path: &str, kind: EntryType, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o750 } else { 0o640 });
        header.set_uid(u64::from(rustix::process::getuid().as_raw()));
        header.set_gid(u64::from(rustix::process::getgid().as_raw()));
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.raw(path, EntryType::Regular, "", content.as_bytes())
    }

    fn folder(self, path: &str) -> Self {
        self.raw(path, EntryType::Directory, "", b"")
    }

    fn symlink(self, path: &str, to: &str) -> Self {
        self.raw(path, EntryType::Symlink, to, b"")
    }

    fn link(self, path: &str, to: &str) -> Self {
        self.raw(path, EntryType::Link, to, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A folder to unpack into, next to a secret that must stay as it is.
struct Place {
    outer: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("root")).unwrap();
        fs::write(outer.path().join("secret"), "secret").unwrap();
        Self { outer }
    }

    fn root(&self) -> std::path::PathBuf {
        self.outer.path().join("root")
    }

    fn unpack(&self, layers: Vec<Vec<u8>>) -> Result<Unpacked, UnpackError> {
        let files = layers.into_iter().map(|bytes| {
            let mut file = tempfile::tempfile().unwrap();
            io::Write::write_all(&mut file, &bytes).unwrap();
            io::Seek::rewind(&mut file).unwrap();
            file
        });
        unpack(files, &mut Target::new(File::open(self.root()).unwrap().into()), BOUNDS)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap()
    }

    fn has(&self, path: &str) -> bool {
        fs::symlink_metadata(self.root().join(path)).is_ok()
    }

    fn assert_nothing_escaped(&self) {
        assert_eq!(fs::read_to_string(self.outer.path().join("secret")).unwrap(), "secret");
        let names: Vec<_> = fs::read_dir(self.outer.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }
}

#[test]
fn files_folders_and_links_arrive_with_mode_and_time() {
    let place = Place::new();
    let layer = Layer::new().folder("bin").file("bin/a", "content").symlink("bin/b", "a").link("bin/c", "bin/a");
    let unpacked = place.unpack(vec![layer.bytes()]).unwrap();
    assert_eq!(unpacked, Unpacked { bytes: 7, entries: 4 });
    assert_eq!(place.read("bin/b"), "content");
    let (a, c) = (fs::metadata(place.root().join("bin/a")).unwrap(), fs::metadata(place.root().join("bin/c")).unwrap());
    assert_eq!((a.ino(), a.mode() & 0o7777, a.mtime()), (c.ino(), 0o640, 1_000_000));
    let folder = fs::metadata(place.root().join("bin")).unwrap();
    assert_eq!((folder.mode() & 0o7777, folder.mtime()), (0o750, 1_000_000));
}

#[test]
fn a_fifo_and_a_symbolic_link_arrive_with_mode_and_time_too() {
    let place = Place::new();
    place.unpack(vec![Layer::new().raw("pipe", EntryType::Fifo, "", b"").symlink("link", "pipe").bytes()]).unwrap();
    let (pipe, link) = (fs::symlink_metadata(place.root().join("pipe")).unwrap(), fs::symlink_metadata(place.root().join("link")).unwrap());
    assert!(pipe.file_type().is_fifo() && link.is_symlink());
    assert_eq!((pipe.mode() & 0o7777, pipe.mtime(), link.mtime()), (0o640, 1_000_000, 1_000_000));
}

#[test]
fn a_whiteout_deletes_and_an_opaque_folder_starts_empty() {
    let place = Place::new();
    let lower = Layer::new().file("etc/a", "1").file("etc/b", "2").file("opt/x/old", "3");
    let upper = Layer::new().file("etc/.wh.a", "").file("opt/.wh..wh..opq", "").file("opt/new", "4");
    place.unpack(vec![lower.bytes(), upper.bytes()]).unwrap();
    assert!(!place.has("etc/a") && !place.has("etc/.wh.a") && !place.has("opt/x"));
    assert_eq!((place.read("etc/b"), place.read("opt/new")), ("2".to_owned(), "4".to_owned()));
}

#[test]
fn what_a_layer_hides_is_below_it_wherever_in_it_that_is_said() {
    let place = Place::new();
    let lower =
        Layer::new().file("opt/old", "1").file("opt/kept/old", "2").file("opt/implied/old", "3").file("etc/a", "4").file("etc/b/old", "5");
    let upper = Layer::new()
        .file("opt/new", "6")
        .folder("opt/kept")
        .file("opt/kept/new", "7")
        .file("opt/implied/deep/new", "8")
        .symlink("opt/link", "/etc")
        .file("opt/.wh..wh..opq", "")
        .file("etc/a", "9")
        .file("etc/b/new", "10")
        .file("etc/.wh.a", "")
        .file("etc/.wh.b", "");
    place.unpack(vec![lower.bytes(), upper.bytes()]).unwrap();

    for (path, content) in [("opt/new", "6"), ("opt/kept/new", "7"), ("opt/implied/deep/new", "8"), ("etc/a", "9"), ("etc/b/new", "10")] {
        assert_eq!(place.read(path), content, "{path}");
    }
    for hidden in ["opt/old", "opt/kept/old", "opt/implied/old", "etc/b/old"] {
        assert!(!place.has(hidden), "{hidden}");
    }
    assert!(fs::symlink_metadata(place.root().join("opt/link")).unwrap().is_symlink());
}

#[test]
fn what_one_layer_put_there_the_next_one_hides() {
    let place = Place::new();
    let lower = Layer::new().file("opt/a", "1").file("opt/b", "2");
    let upper = Layer::new().file("opt/.wh.a", "").file("opt/.wh..wh..opq", "");
    place.unpack(vec![lower.bytes(), upper.bytes()]).unwrap();
    assert!(!place.has("opt/a") && !place.has("opt/b") && place.has("opt"));
}

#[test]
fn an_upper_layer_replaces_a_folder_by_a_file_and_a_link_by_a_folder() {
    let place = Place::new();
    let lower = Layer::new().file("a/inside", "1").symlink("b", "/a");
    let upper = Layer::new().file("a", "2").folder("b");
    place.unpack(vec![lower.bytes(), upper.bytes()]).unwrap();
    assert_eq!(place.read("a"), "2");
    assert!(fs::symlink_metadata(place.root().join("b")).unwrap().is_dir());
}

#[test]
fn gzip_and_zstd_layers_are_told_by_their_first_bytes() {
    let place = Place::new();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    io::Write::write_all(&mut gzip, &Layer::new().file("gzip", "g").bytes()).unwrap();
    let zstd = zstd::encode_all(Layer::new().file("zstd", "z").bytes().as_slice(), 1).unwrap();
    place.unpack(vec![gzip.finish().unwrap(), zstd]).unwrap();
    assert_eq!((place.read("gzip"), place.read("zstd")), ("g".to_owned(), "z".to_owned()));
}

#[test]
fn a_path_with_dots_is_refused() {
    let place = Place::new();
    let error = place.unpack(vec![Layer::new().file("../secret", "pwned").bytes()]).unwrap_err().to_string();
    assert!(error.contains("../secret"), "{error}");
    place.assert_nothing_escaped();
}

#[test]
fn an_absolute_path_stays_inside() {
    let place = Place::new();
    place.unpack(vec![Layer::new().file("/etc/inside", "x").bytes()]).unwrap();
    assert_eq!(place.read("etc/inside"), "x");
    place.assert_nothing_escaped();
}

#[test]
fn a_symlink_to_the_outside_leads_inside() {
    let place = Place::new();
    let absolute = place.outer.path().to_str().unwrap().to_owned();
    let layer = Layer::new().symlink("out", &absolute).symlink("up", "../..").file("up/secret", "pwned");
    // `up` means the root itself to a process whose root this is; the absolute link names a folder that does not exist there.
    place.unpack(vec![layer.bytes()]).unwrap();
    assert_eq!(place.read("secret"), "pwned");
    let through = place.unpack(vec![Layer::new().file("out/secret", "pwned").bytes()]);
    assert!(through.is_ok() || through.is_err(), "either is fine");
    place.assert_nothing_escaped();
}

#[test]
fn a_hard_link_cannot_reach_the_outside() {
    let place = Place::new();
    let direct = Layer::new().link("stolen", "../secret");
    assert!(place.unpack(vec![direct.bytes()]).is_err());
    let through = Layer::new().symlink("up", "..").link("stolen", "up/secret");
    assert!(place.unpack(vec![through.bytes()]).is_err());
    assert!(!place.has("stolen"));
    place.assert_nothing_escaped();
}

#[test]
fn a_file_entry_replaces_a_symlink_instead_of_writing_through_it() {
    let place = Place::new();
    let layer = Layer::new().file("target", "1").symlink("name", "target").file("name", "2");
    place.unpack(vec![layer.bytes()]).unwrap();
    assert_eq!((place.read("target"), place.read("name")), ("1".to_owned(), "2".to_owned()));
}

#[test]
fn a_whiteout_of_dots_deletes_nothing() {
    let place = Place::new();
    for name in [".wh..", ".wh...", "a/.wh..."] {
        let error = place.unpack(vec![Layer::new().file("keep", "1").file(name, "").bytes()]).unwrap_err().to_string();
        assert!(error.contains("whiteout"), "{name}: {error}");
    }
    assert_eq!(place.read("keep"), "1");
    place.assert_nothing_escaped();
}

#[test]
fn devices_are_left_out() {
    let place = Place::new();
    place.unpack(vec![Layer::new().raw("dev/sda", EntryType::Block, "", b"").raw("dev/mem", EntryType::Char, "", b"").bytes()]).unwrap();
    assert!(!place.has("dev/sda") && !place.has("dev/mem"));
}

#[test]
fn too_many_bytes_or_entries_end_it() {
    let big = vec![0_u8; 700_000];
    let bomb = Layer::new().raw("a", EntryType::Regular, "", &big).raw("b", EntryType::Regular, "", &big);
    assert!(matches!(Place::new().unpack(vec![bomb.bytes()]), Err(UnpackError::TooManyBytes(_))));
    let many = (0..101).fold(Layer::new(), |layer, n| layer.folder(&format!("d{n}")));
    assert!(matches!(Place::new().unpack(vec![many.bytes()]), Err(UnpackError::TooManyEntries(_))));
}

#[test]
fn a_file_within_which_its_archive_ends_is_not_there() {
    let place = Place::new();
    let layer = Layer::new().file("whole", "1").file("cut", &"2".repeat(2000)).bytes();
    // The head and content of the first in two blocks, the head of the second in one, and half of its content.
    let error = place.unpack(vec![layer[..2560].to_vec()]).unwrap_err().to_string();
    assert!(error.contains("cut") && error.contains("ends within it"), "{error}");
    assert!(place.has("whole") && !place.has("cut"));
    place.unpack(vec![layer]).unwrap();
    assert!(place.has("cut"), "the control");
}

/// Where headers begin in a layer of ours.
fn headers(layer: &[u8]) -> Vec<usize> {
    let (mut all, mut at) = (Vec::new(), 0);
    while at + 512 <= layer.len() && layer[at] != 0 {
        all.push(at);
        let size = Header::from_byte_slice(&layer[at..at + 512]).size().unwrap();
        at += 512 + usize::try_from(size.next_multiple_of(512)).unwrap();
    }
    all
}

/// Makes a header's sum what it should be (tar(5)).
fn sum_up(header: &mut [u8]) {
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

#[test]
fn no_change_of_a_layer_leads_it_outside_or_beyond_its_bounds() {
    let lower = Layer::new()
        .folder("a")
        .file("a/one", "1")
        .file("a/two", "2")
        .symlink("up", "..")
        .symlink("out", "/")
        .link("hard", "a/one")
        .bytes();
    let upper = Layer::new()
        .file("a/.wh.two", "")
        .file("up/x", "2")
        .link("b", "out/a/one")
        .symlink("c", "../../secret")
        .file("c", "3")
        .raw("pipe", EntryType::Fifo, "", b"")
        .folder("deep/er")
        .file("deep/.wh..wh..opq", "")
        .file("out/secret", "4")
        .bytes();
    Place::new().unpack(vec![lower.clone(), upper.clone()]).expect("as it is there is nothing wrong with it");
    let at = headers(&upper);
    // The same ones every time (xorshift64).
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % bound as u64).unwrap()
    };
    let telling = b"./\0 .wh017LKSgx25\xff";
    let (mut good, mut bad) = (0, 0);
    for _ in 0..600 {
        let mut layer = upper.clone();
        for _ in 0..=below(6) {
            // Name, size, kind and target are where it matters.
            let place = [below(100), 124 + below(12), 156, 157 + below(100), below(500)][below(5)];
            layer[at[below(at.len())] + place] = telling[below(telling.len())];
        }
        at.iter().for_each(|at| sum_up(&mut layer[*at..at + 512]));
        let place = Place::new();

        let unpacked = place.unpack(vec![lower.clone(), layer]);

        place.assert_nothing_escaped();
        match unpacked {
            Ok(Unpacked { bytes, entries }) => {
                assert!(bytes <= BOUNDS.bytes && entries <= BOUNDS.entries);
                good += 1;
            }
            Err(_) => bad += 1,
        }
    }
    assert!(good > 20 && bad > 20, "{good} were unpacked, {bad} refused: these changes try nothing");
}

#[test]
fn a_layer_that_is_cut_short_is_an_error() {
    let whole = Layer::new().raw("a", EntryType::Regular, "", &[7; 3000]).bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    io::Write::write_all(&mut gzip, &whole).unwrap();
    let gzip = gzip.finish().unwrap();
    for cut in [whole[..1024].to_vec(), gzip[..gzip.len() / 2].to_vec()] {
        let place = Place::new();
        assert!(place.unpack(vec![cut]).is_err());
        place.assert_nothing_escaped();
    }
}

/// A record of an extended header: its own length in decimal, a blank, and what it says (pax(1)).
fn record(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let len = (1..5).map(|digits| rest.len() + digits).find(|len| len.to_string().len() + rest.len() == *len).unwrap();
    format!("{len}{rest}")
}

/// The names of a file's extended attributes.
fn extended(path: &std::path::Path) -> Vec<String> {
    let mut names = vec![0; 4096];
    let len = rustix::fs::listxattr(path, &mut names).unwrap();
    let names = String::from_utf8(names[..len].to_vec()).unwrap();
    // What the host itself puts on every file.
    names.split_terminator('\0').filter(|name| *name != "security.selinux").map(str::to_owned).collect()
}

#[test]
fn of_extended_attributes_only_the_users_own_come_along() {
    let names = ["user.note", "user.overlay.opaque", "trusted.overlay.opaque", "security.capability", "system.posix_acl_access"];
    let records: String = names.iter().map(|name| record(&format!("SCHILY.xattr.{name}"), "value")).collect();
    let place = Place::new();

    place.unpack(vec![Layer::new().raw("header", EntryType::XHeader, "", records.as_bytes()).file("noted", "x").bytes()]).unwrap();

    assert_eq!(extended(&place.root().join("noted")), ["user.note"]);
    let mut value = [0; 16];
    let len = rustix::fs::getxattr(place.root().join("noted"), "user.note", &mut value).unwrap();
    assert_eq!(&value[..len], b"value");
}

#[test]
fn of_two_names_in_one_extended_header_neither_leads_outside() {
    let place = Place::new();
    let records = record("path", "good") + &record("path", "../../secret");
    // Whichever counts.
    drop(place.unpack(vec![Layer::new().raw("header", EntryType::XHeader, "", records.as_bytes()).file("plain", "x").bytes()]));
    place.assert_nothing_escaped();
}
