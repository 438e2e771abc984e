//! Archives of every kind, and the hostile ones that must be refused.

use std::io::{Seek, Write};

use serde_json::{Value, json};

use super::*;

/// A tar archive in the making.
struct Packer(tar::Builder<Vec<u8>>);

impl Packer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn add(&mut self, name: &str, content: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        // The library refuses names with `..`; an attacker does not.
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
    }

    fn add_json(&mut self, name: &str, content: &Value) {
        self.add(name, content.to_string().as_bytes());
    }

    /// Adds a blob under its true digest, and describes it.
    fn blob(&mut self, media_type: &str, content: &[u8]) -> Value {
        let digest = digest_of(content);
        self.add(&format!("blobs/sha256/{digest}"), content);
        json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() })
    }

    fn image(&mut self, architecture: &str) -> Value {
        let config = self.blob(CONFIG, config(architecture, &[b"layer"]).to_string().as_bytes());
        let layer = self.blob(LAYER, b"layer");
        self.blob(MANIFEST, manifest(&config, &[layer]).to_string().as_bytes())
    }

    fn index(mut self, manifests: &[Value]) -> Self {
        self.add_json("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }));
        self.add_json("index.json", &json!({ "schemaVersion": 2, "manifests": manifests }));
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn find(self) -> Result<Found, Fault> {
        find_in(&self.bytes(), "python")
    }
}

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn here() -> String {
    Arch::default().to_string()
}

fn config(architecture: &str, layers: &[&[u8]]) -> Value {
    let diff_ids: Vec<_> = layers.iter().map(|layer| format!("sha256:{}", digest_of(layer))).collect();
    json!({ "architecture": architecture, "os": "linux", "config": { "Cmd": ["sh"] }, "rootfs": { "type": "layers", "diff_ids": diff_ids } })
}

fn manifest(config: &Value, layers: &[Value]) -> Value {
    json!({ "schemaVersion": 2, "config": config, "layers": layers })
}

fn open(bytes: &[u8]) -> Result<Archive, Fault> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    Archive::open(file, &std::env::temp_dir())
}

fn find_in(bytes: &[u8], reference: &str) -> Result<Found, Fault> {
    find(&open(bytes)?, reference)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Fault>, because: &str) {
    match result {
        Err(Fault::Invalid(why)) => assert!(why.contains(because), "refused, but with: {why}"),
        other => panic!("not refused: {other:?}"),
    }
}

fn good() -> Packer {
    let mut packer = Packer::new();
    let manifest = packer.image(&here());
    packer.index(&[manifest])
}

/// An image of this layer alone, with this configuration.
fn committed(layer: &[u8], configuration: &Value) -> Result<Found, Fault> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(layer).unwrap();
    let (archive, section) = Archive::of_layer(file)?;
    of_layer(&archive, section, serde_json::from_value(configuration.clone()).unwrap())
}

#[test]
fn a_layer_by_itself_is_an_image_whose_documents_name_it() {
    // The layers of the one before are no part of it.
    let found = committed(b"all files", &config(&here(), &[b"one", b"two"])).unwrap();

    let digest = format!("sha256:{}", digest_of(b"all files"));
    let manifest: ImageManifest = serde_json::from_slice(&found.manifest.bytes).unwrap();
    assert_eq!(found.configuration.rootfs().diff_ids(), std::slice::from_ref(&digest));
    assert_eq!((manifest.layers().len(), manifest.layers()[0].digest().to_string()), (1, digest));
    assert_eq!(manifest.config().digest().to_string(), format!("sha256:{}", digest_of(&found.config.bytes)));
    assert_eq!((found.size_bytes(), found.digests().len()), (9, 3));
    assert_eq!(serde_json::from_slice::<ImageConfiguration>(&found.config.bytes).unwrap(), found.configuration);
}

#[test]
fn the_same_files_and_the_same_configuration_are_the_same_image() {
    let digest = |layer: &[u8]| committed(layer, &config(&here(), &[])).unwrap().manifest.digest;

    assert_eq!(digest(b"same"), digest(b"same"));
    assert_ne!(digest(b"same"), digest(b"other"));
}

#[test]
fn a_configuration_that_no_import_would_bring_is_none_for_a_layer_either() {
    let mut large = config(&here(), &[]);
    large["config"]["Env"] = json!([format!("A={}", "x".repeat(CONFIG_BYTES_MAX))]);

    refused(committed(b"layer", &large), "bytes; at most");
    let mut wide = config(&here(), &[]);
    wide["config"]["ExposedPorts"] = (0..15_000).map(|port| (format!("{port}/tcp"), json!({}))).collect();
    refused(committed(b"layer", &wide), "bytes of JSON; at most");
    // How it was built is not in its row.
    let mut old = config(&here(), &[]);
    old["history"] = json!([{ "created_by": "x".repeat(ROW_BYTES_MAX), "empty_layer": true }]);
    committed(b"layer", &old).unwrap();
    refused(committed(b"layer", &config("riscv64", &[])), "this machine is");
}

#[test]
fn an_oci_layout_is_found() {
    let found = good().find().unwrap();
    assert_eq!(found.layers.len(), 1);
    assert_eq!(found.layers[0].digest, digest_of(b"layer"));
    assert_eq!(found.size_bytes(), 5);
    assert_eq!(found.digests().len(), 3);
}

#[test]
fn gzip_and_zstd_around_an_archive_are_seen_through() {
    let plain = good().bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    assert!(find_in(&gzip.finish().unwrap(), "python").is_ok());
    assert!(find_in(&zstd::encode_all(&plain[..], 1).unwrap(), "python").is_ok());
}

#[test]
fn a_leading_dot_in_names_does_not_matter() {
    let mut packer = Packer::new();
    packer.add_json("./oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }));
    packer.add_json("./index.json", &json!({ "schemaVersion": 2, "manifests": [] }));
    refused(packer.find(), "no image for linux/");
}

#[test]
fn this_machines_image_is_taken_out_of_a_nested_index() {
    let mut packer = Packer::new();
    let other = packer.image("s390x");
    let ours = packer.image(&here());
    let inner = packer.blob(INDEX, json!({ "schemaVersion": 2, "manifests": [other, ours] }).to_string().as_bytes());
    let found = packer.index(&[inner]).find().unwrap();
    assert_eq!(*found.configuration.architecture(), Arch::default());
}

#[test]
fn of_several_images_the_one_with_the_references_name_is_taken() {
    let build = || {
        let mut packer = Packer::new();
        let mut one = packer.image(&here());
        let second = config(&here(), &[b"second"]);
        let second_config = packer.blob(CONFIG, second.to_string().as_bytes());
        let layer = packer.blob(LAYER, b"second");
        let mut two = packer.blob(MANIFEST, manifest(&second_config, &[layer]).to_string().as_bytes());
        one["annotations"] = json!({ REFERENCE_ANNOTATION: "one" });
        two["annotations"] = json!({ REFERENCE_ANNOTATION: "two" });
        packer.index(&[one, two]).bytes()
    };
    assert_eq!(find_in(&build(), "python:two").unwrap().layers[0].digest, digest_of(b"second"));
    refused(find_in(&build(), "three"), "2 images");
}

#[test]
fn an_image_for_another_machine_is_refused() {
    let mut packer = Packer::new();
    let other = packer.image("s390x");
    refused(packer.index(&[other]).find(), "no image for linux/");
}

#[test]
fn a_missing_layer_is_named() {
    let mut packer = Packer::new();
    let config = packer.blob(CONFIG, config(&here(), &[b"layer"]).to_string().as_bytes());
    let layer = json!({ "mediaType": LAYER, "digest": format!("sha256:{}", digest_of(b"layer")), "size": 5 });
    let manifest = packer.blob(MANIFEST, manifest(&config, &[layer]).to_string().as_bytes());
    refused(packer.index(&[manifest]).find(), digest_of(b"layer").digest());
}

#[test]
fn a_manifest_with_another_digest_is_refused() {
    let mut packer = Packer::new();
    let mut described = packer.image(&here());
    let digest = digest_of(b"promised");
    let content = b"{\"schemaVersion\":2}";
    packer.add(&format!("blobs/sha256/{digest}"), content);
    described["digest"] = json!(format!("sha256:{digest}"));
    described["size"] = json!(content.len());
    refused(packer.index(&[described]).find(), "another digest");
}

#[test]
fn a_size_that_is_not_the_archives_is_refused() {
    let mut packer = Packer::new();
    let mut manifest = packer.image(&here());
    manifest["size"] = json!(u64::MAX);
    refused(packer.index(&[manifest]).find(), "by its descriptor");
}

#[test]
fn a_digest_that_is_a_path_is_refused() {
    let mut packer = Packer::new();
    packer.add("blobs/sha256/../../x", b"{}");
    let manifest = json!({ "mediaType": MANIFEST, "digest": "sha256:../../x", "size": 2 });
    refused(packer.index(&[manifest]).find(), "index.json");
}

#[test]
fn a_digest_of_another_kind_is_refused() {
    let manifest = json!({ "mediaType": MANIFEST, "digest": format!("sha512:{}", "a".repeat(128)), "size": 2 });
    refused(Packer::new().index(&[manifest]).find(), "not of the kind sha256");
}

#[test]
fn indexes_in_indexes_come_to_an_end() {
    let mut packer = Packer::new();
    let mut inner = packer.image(&here());
    for _ in 0..10 {
        inner = packer.blob(INDEX, json!({ "schemaVersion": 2, "manifests": [inner] }).to_string().as_bytes());
    }
    refused(packer.index(&[inner]).find(), "nested");
}

#[test]
fn an_index_that_names_another_one_a_thousand_times_is_refused() {
    let mut packer = Packer::new();
    let mut inner = packer.image(&here());
    for _ in 0..3 {
        inner = packer.blob(INDEX, json!({ "schemaVersion": 2, "manifests": vec![inner; 50] }).to_string().as_bytes());
    }
    refused(packer.index(&[inner]).find(), "more than 1000 manifests");
}

#[test]
fn a_document_that_is_too_large_is_not_read() {
    let mut packer = Packer::new();
    packer.add("index.json", &vec![b' '; 5 << 20]);
    packer.add_json("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }));
    refused(packer.find(), "at most 4194304");
}

#[test]
fn a_configuration_with_another_number_of_layers_is_refused() {
    let mut packer = Packer::new();
    let config = packer.blob(CONFIG, config(&here(), &[b"a", b"b"]).to_string().as_bytes());
    let layer = packer.blob(LAYER, b"a");
    let manifest = packer.blob(MANIFEST, manifest(&config, &[layer]).to_string().as_bytes());
    refused(packer.index(&[manifest]).find(), "1 layers");
}

#[test]
fn an_environment_that_no_launch_can_carry_is_refused() {
    let mut packer = Packer::new();
    let mut config = config(&here(), &[b"layer"]);
    config["config"]["Env"] = json!([format!("A={}", "x".repeat(CONFIG_BYTES_MAX))]);
    let config = packer.blob(CONFIG, config.to_string().as_bytes());
    let layer = packer.blob(LAYER, b"layer");
    let manifest = packer.blob(MANIFEST, manifest(&config, &[layer]).to_string().as_bytes());
    refused(packer.index(&[manifest]).find(), "at most 65536");
}

#[test]
fn a_zero_byte_outside_of_what_a_launch_needs_is_refused_too() {
    let mut packer = Packer::new();
    let mut config = config(&here(), &[b"layer"]);
    config["author"] = json!("\0");
    let config = packer.blob(CONFIG, config.to_string().as_bytes());
    let layer = packer.blob(LAYER, b"layer");
    let manifest = packer.blob(MANIFEST, manifest(&config, &[layer]).to_string().as_bytes());
    refused(packer.index(&[manifest]).find(), "zero byte");
}

#[test]
fn a_zero_byte_that_no_row_can_hold_is_refused() {
    let mut packer = Packer::new();
    let mut config = config(&here(), &[b"layer"]);
    config["config"]["Env"] = json!(["A=\0"]);
    let config = packer.blob(CONFIG, config.to_string().as_bytes());
    let layer = packer.blob(LAYER, b"layer");
    let manifest = packer.blob(MANIFEST, manifest(&config, &[layer]).to_string().as_bytes());
    refused(packer.index(&[manifest]).find(), "zero byte");
}

#[test]
fn a_layer_of_an_unknown_kind_is_refused() {
    let mut packer = Packer::new();
    let config = packer.blob(CONFIG, config(&here(), &[b"layer"]).to_string().as_bytes());
    let layer = packer.blob("application/vnd.oci.image.layer.v1.tar+encrypted", b"layer");
    let manifest = packer.blob(MANIFEST, manifest(&config, &[layer]).to_string().as_bytes());
    refused(packer.index(&[manifest]).find(), "+encrypted");
}

#[test]
fn bytes_that_are_no_archive_are_refused() {
    refused(open(b"this is not a tar archive"), "not a tar archive");
    refused(open(&[7; 4096]), "not a tar archive");
    refused(find_in(b"", "x"), "neither index.json");
    refused(open(&[0x1f, 0x8b, 8, 0, 1, 2, 3]), "cannot be decompressed");
}

#[test]
fn an_archive_that_breaks_off_is_refused() {
    let bytes = good().bytes();
    let whole = bytes.len();
    refused(open(&bytes[..whole - 2048 + 100]), "");
    refused(open(&bytes[..600]), "in the middle of");
}

#[test]
fn a_header_that_claims_more_than_there_is_costs_no_memory() {
    let mut long_name = tar::Header::new_gnu();
    long_name.set_entry_type(tar::EntryType::GNULongName);
    long_name.set_size(1 << 40);
    long_name.set_cksum();
    let archive = open(long_name.as_bytes());
    refused(archive.and_then(|archive| find(&archive, "x")), "");
}

/// As `docker save` wrote it before version 25.
fn saved(config: &Value, layers: &[(&str, &[u8])]) -> Packer {
    let mut packer = Packer::new();
    for (name, content) in layers {
        packer.add(name, content);
    }
    packer.add_json("config.json", config);
    let names: Vec<_> = layers.iter().map(|(name, _)| name).collect();
    packer.add_json("manifest.json", &json!([{ "Config": "config.json", "RepoTags": ["python:latest"], "Layers": names }]));
    packer
}

#[test]
fn an_archive_that_docker_saved_gets_a_manifest() {
    let found = saved(&config(&here(), &[b"one", b"two"]), &[("1/layer.tar", b"one"), ("2/layer.tar", b"two")]).find().unwrap();
    let manifest: ImageManifest = serde_json::from_slice(&found.manifest.bytes).unwrap();
    assert_eq!(manifest.layers().len(), 2);
    assert_eq!(manifest.layers()[1].as_digest_sha256(), Some(digest_of(b"two").digest()));
    assert_eq!(*manifest.layers()[0].media_type(), MediaType::ImageLayer);
    assert_eq!(found.manifest.digest, digest_of(&found.manifest.bytes));
}

#[test]
fn the_same_saved_image_has_the_same_digest_every_time() {
    let digest = || saved(&config(&here(), &[b"one"]), &[("1/layer.tar", b"one")]).find().unwrap().manifest.digest;
    assert_eq!(digest(), digest());
}

#[test]
fn a_saved_layer_that_was_changed_is_refused() {
    refused(saved(&config(&here(), &[b"one"]), &[("1/layer.tar", b"two")]).find(), "digest");
}

#[test]
fn a_saved_layer_may_be_a_link_to_another() {
    let mut packer = Packer::new();
    packer.add("abc.tar", b"one");
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    packer.0.append_link(&mut header, "1/layer.tar", "../abc.tar").unwrap();
    packer.add_json("config.json", &config(&here(), &[b"one"]));
    packer.add_json("manifest.json", &json!([{ "Config": "config.json", "Layers": ["1/layer.tar"] }]));
    assert_eq!(packer.find().unwrap().layers[0].digest, digest_of(b"one"));
}

#[test]
fn a_saved_configuration_outside_the_archive_is_not_looked_for() {
    let mut packer = Packer::new();
    packer.add_json("manifest.json", &json!([{ "Config": "/etc/passwd", "Layers": [] }]));
    refused(packer.find(), "lacks \"/etc/passwd\"");
}

#[test]
fn a_layer_is_read_from_where_it_lies() {
    let archive = open(&good().bytes()).unwrap();
    let found = find(&archive, "python").unwrap();
    let text = std::io::read_to_string(archive.reader(found.layers[0].section)).unwrap();
    assert_eq!(text, "layer");
}

/// The same numbers every time (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}

/// What nobody expects anywhere.
fn strange(random: &mut Random) -> Value {
    let deep = (0..200).fold(json!([]), |inner, _| json!([inner]));
    let all = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("\0"),
        json!("sha256:../../../etc/passwd"),
        json!(format!("sha512:{}", "a".repeat(128))),
        json!("x".repeat(70_000)),
        json!([]),
        json!({}),
        deep,
    ];
    all[random.below(all.len())].clone()
}

/// Makes something in it strange, leaves it out, or has it twice.
fn change(value: &mut Value, random: &mut Random) {
    let is_deeper = random.below(5) > 0;
    match value {
        Value::Object(members) if is_deeper && !members.is_empty() => {
            let key = members.keys().nth(random.below(members.len())).unwrap().clone();
            if random.below(6) == 0 {
                members.remove(&key);
            } else {
                change(&mut members[&key], random);
            }
        }
        Value::Array(items) if is_deeper && !items.is_empty() => {
            let at = random.below(items.len());
            if random.below(6) == 0 {
                items.push(items[at].clone());
            } else {
                change(&mut items[at], random);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => *value = strange(random),
    }
}

#[test]
fn whatever_is_changed_of_an_image_it_is_taken_or_refused() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..800 {
        let mut packer = Packer::new();
        let which = random.below(4);
        let layer = packer.blob(LAYER, b"layer");
        let mut configuration = config(&here(), &[b"layer"]);
        if which == 0 {
            change(&mut configuration, &mut random);
        }
        let configuration = configuration.to_string();
        let mut manifest = manifest(&packer.blob(CONFIG, configuration.as_bytes()), &[layer]);
        if which == 1 {
            change(&mut manifest, &mut random);
        }
        // As a pull looks at them, before its layers are here.
        if let Ok(parsed) = serde_json::from_value::<ImageManifest>(manifest.clone()) {
            assert!(!matches!(check(&parsed, configuration.as_bytes()), Err(Fault::Host(_))));
        }
        let mut index = json!({ "schemaVersion": 2, "manifests": [packer.blob(MANIFEST, manifest.to_string().as_bytes())] });
        if which == 2 {
            change(&mut index, &mut random);
        }
        packer.add_json("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }));
        packer.add_json("index.json", &index);
        let mut bytes = packer.bytes();
        for _ in 0..if which == 3 { 1 + random.below(20) } else { 0 } {
            let at = random.below(bytes.len());
            bytes[at] = b"\x00017.x{\"\xff"[random.below(8)];
        }
        match find_in(&bytes, "python") {
            Ok(_) => taken += 1,
            Err(Fault::Invalid(_)) => refused += 1,
            Err(Fault::Host(error)) => panic!("{error:#}"),
        }
    }
    assert!(taken > 20 && refused > 100, "{taken} were taken, {refused} refused: these changes try nothing");
}
