//! Images come in as archives of every common kind; hostile ones are refused with a reason and leave nothing behind.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use mayfly_tests::{
    Answer, Client, image,
    outcome::{assert_exit, stdout},
    service::{self, Shared, finish, import, mayfly, shared},
    token,
};
use serde_json::{Value, json};

async fn says_hello(client: &Client, image: &str) {
    let run = client.run(&json!({ "image": image, "command": ["sh", "-c", "echo hello from here"] })).await;
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "hello from here\n");
}

/// A name that no other test has.
fn name() -> String {
    format!("test-{}", uuid::Uuid::new_v4().simple())
}

fn busybox() -> PathBuf {
    image::archive("busybox").expect("the recipe works")
}

#[tokio::test]
async fn an_oci_archive_is_an_image() {
    let service = shared();
    let name = name();

    import(&service.place, &busybox(), &name).unwrap();

    says_hello(&service.client(), &name).await;
}

#[tokio::test]
async fn an_archive_that_docker_saved_is_an_image() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let saved = folder.path().join("saved.tar");
    let source = format!("oci-archive:{}", busybox().display());
    image::run(Command::new("skopeo").args([
        "--insecure-policy",
        "copy",
        &source,
        &format!("docker-archive:{}:busybox:1", saved.display()),
    ]))
    .unwrap();

    import(&service.place, &saved, &name).unwrap();

    says_hello(&service.client(), &name).await;
}

#[tokio::test]
async fn an_oci_layout_folder_is_an_image() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let layout = folder.path().join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();

    import(&service.place, &layout, &name).unwrap();

    says_hello(&service.client(), &name).await;
}

#[tokio::test]
async fn a_plain_folder_is_an_image() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/echo")).unwrap();
    let admin = token::sign(&token::claims("operator", "admin"), &service.place.secret_file());
    let mut command = mayfly();
    command.args(["image", "import"]).arg(&root).args(["--reference", &name, "--url", &service.place.url, "--token", &admin]);
    command.args(["--cmd", "sh", "--env", "PATH=/bin", "--env", "GREETING=hi"]);

    let (status, said) = finish(&mut command, Duration::from_secs(60)).unwrap();

    assert!(status.success(), "{said}");
    assert!(said.contains(&name) && said.contains("sha256:"), "{said}");
    says_hello(&service.client(), &name).await;
    let run = service.client().run(&json!({ "image": name, "stdin": "echo $GREETING" })).await;
    assert_eq!(stdout(&run), "hi\n");
}

#[tokio::test]
async fn a_compressed_archive_is_an_image() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let packed = folder.path().join("image.tar.gz");
    image::run(Command::new("sh").args(["-c", "gzip -1 < \"$0\" > \"$1\""]).arg(busybox()).arg(&packed)).unwrap();

    import(&service.place, &packed, &name).unwrap();

    says_hello(&service.client(), &name).await;
}

#[tokio::test]
async fn the_same_archive_twice_is_one_image() {
    let (service, name) = (shared(), name());
    import(&service.place, &busybox(), &name).unwrap();
    let client = service.client();
    let first = client.get(&format!("/v1/images/{name}")).await.expect(200);

    import(&service.place, &busybox(), &name).unwrap();
    let second = client.get(&format!("/v1/images/{name}")).await.expect(200);

    assert_eq!(first["digest"], second["digest"]);
    assert!(first["digest"].as_str().unwrap().starts_with("sha256:"), "{first:#}");
    says_hello(&client, &name).await;
}

#[tokio::test]
async fn an_upper_layer_deletes_what_a_lower_one_brought() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let layout = folder.path().join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();
    let layer = folder.path().join("layer");
    fs::create_dir_all(layer.join("etc")).unwrap();
    fs::write(layer.join("etc/.wh.group"), "").unwrap();
    fs::write(layer.join("etc/new"), "from above\n").unwrap();
    add_layer(&layout, &layer, folder.path());

    import(&service.place, &layout, &name).unwrap();
    let run =
        service.client().run(&json!({ "image": name, "command": ["sh", "-c", "cat /etc/new; test -e /etc/group || echo gone"] })).await;

    assert_eq!(stdout(&run), "from above\ngone\n", "{run:#}");
}

#[tokio::test]
async fn a_layer_with_paths_that_lead_outside_writes_nothing_outside() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let target = folder.path().join("escaped");
    let (layout, tar) = (folder.path().join("layout"), folder.path().join("evil.tar"));
    image::unpack_layout(&busybox(), &layout).unwrap();
    fs::write(folder.path().join("payload"), "x").unwrap();
    let up = format!("s|payload|../../../../../../../../../..{}|", target.display());
    image::run(Command::new("tar").arg("-C").arg(folder.path()).arg("-Pcf").arg(&tar).args(["--transform", &up, "payload"])).unwrap();
    append(&layout, &tar);

    let imported = import(&service.place, &layout, &name);

    assert!(!target.exists(), "written outside: {imported:?}");
}

#[tokio::test]
async fn a_layer_that_writes_through_a_symlink_writes_nothing_outside() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    fs::create_dir_all(&first).unwrap();
    std::os::unix::fs::symlink(&outside, first.join("door")).unwrap();
    fs::create_dir_all(second.join("door")).unwrap();
    fs::write(second.join("door/file"), "x").unwrap();
    let layout = folder.path().join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();
    add_layer(&layout, &first, folder.path());
    add_layer(&layout, &second, folder.path());

    let imported = import(&service.place, &layout, &name);

    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "written outside: {imported:?}");
}

#[tokio::test]
async fn a_device_in_an_image_is_no_device_in_the_sandbox() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let layer = folder.path().join("layer");
    fs::create_dir_all(&layer).unwrap();
    image::run(Command::new("mknod").arg(layer.join("kmsg")).args(["c", "1", "11"])).unwrap();
    let layout = folder.path().join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();
    add_layer(&layout, &layer, folder.path());

    // Refused at the import or useless in the sandbox: both are right.
    if import(&service.place, &layout, &name).is_ok() {
        let run = service.client().run(&json!({ "image": name, "command": ["sh", "-c", "echo x > /kmsg && echo opened"] })).await;
        assert!(!stdout(&run).contains("opened") || !run.to_string().contains("character"), "{run:#}");
        let kind =
            service.client().run(&json!({ "image": name, "command": ["sh", "-c", "dd if=/kmsg bs=1 count=1 2>/dev/null | wc -c"] })).await;
        assert_eq!(stdout(&kind).trim(), "0", "{kind:#}");
    }
}

#[tokio::test]
async fn an_archive_that_lacks_a_layer_is_refused_with_its_digest() {
    let (service, folder) = (shared(), service::folder().unwrap());
    let layout = folder.path().join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();
    let largest = largest_blob(&layout);
    fs::remove_file(&largest).unwrap();

    let problem = upload(&service, &pack(&layout, folder.path())).await.problem(422, "invalid_request");

    let digest = largest.file_name().unwrap().to_str().unwrap();
    assert!(problem["detail"].as_str().unwrap().contains(&digest[..12]), "{problem:#}");
}

#[tokio::test]
async fn an_archive_with_a_changed_layer_is_refused() {
    let (service, folder) = (shared(), service::folder().unwrap());
    let layout = folder.path().join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();
    let largest = largest_blob(&layout);
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&largest, bytes).unwrap();

    let problem = upload(&service, &pack(&layout, folder.path())).await.problem(422, "invalid_request");

    assert!(problem["detail"].as_str().unwrap().contains("digest"), "{problem:#}");
}

#[tokio::test]
async fn an_archive_whose_index_names_a_path_is_refused() {
    let (service, folder) = (shared(), service::folder().unwrap());
    let layout = folder.path().join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();
    let mut index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    index["manifests"][0]["digest"] = json!("sha256:../../../../../../etc/passwd");
    fs::write(layout.join("index.json"), index.to_string()).unwrap();

    let answer = upload(&service, &pack(&layout, folder.path())).await;

    answer.problem(422, "invalid_request");
}

#[tokio::test]
async fn bytes_that_are_no_archive_are_refused() {
    let folder = service::folder().unwrap();
    let file = folder.path().join("noise");
    fs::write(&file, "this is not a tar archive").unwrap();

    let answer = upload(&shared(), &file).await;

    answer.problem(422, "invalid_request");
}

#[tokio::test]
async fn an_empty_upload_is_refused() {
    let folder = service::folder().unwrap();
    let file = folder.path().join("empty");
    fs::write(&file, "").unwrap();

    let answer = upload(&shared(), &file).await;

    answer.problem(422, "invalid_request");
}

#[tokio::test]
async fn an_upload_leaves_no_file_behind() {
    let (service, folder) = (shared(), service::folder().unwrap());
    let file = folder.path().join("noise");
    fs::write(&file, vec![7; 3 << 20]).unwrap();
    upload(&service, &file).await.problem(422, "invalid_request");

    // Other tests upload at the same time: what they have in hand is gone in a moment.
    let uploads = service.place.data_dir.join("uploads");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while fs::read_dir(&uploads).unwrap().count() > 0 {
        assert!(tokio::time::Instant::now() < deadline, "still there: {:?}", fs::read_dir(&uploads).unwrap().flatten().collect::<Vec<_>>());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_tenants_image_is_that_tenants_alone() {
    let service = shared();
    let (mine, other, name) = (service.client(), service.client(), name());
    let path = format!("/v1/images/import?reference={name}");
    let imported = mine.post_raw(&path, "application/x-tar", fs::read(busybox()).unwrap()).await;

    assert_eq!(imported.status, 201, "{}", imported.text);
    says_hello(&mine, &name).await;
    other.post("/v1/runs", &json!({ "image": name })).await.problem(404, "image_not_found");
    let listed = other.get("/v1/images").await.expect(200);
    assert!(!listed.to_string().contains(&name), "{listed:#}");
}

#[tokio::test]
async fn an_image_that_lost_its_name_stays_for_what_can_be_started_again_and_goes_with_it() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let (layout, client) = (folder.path().join("layout"), service.client());
    // Nobody else has the same.
    image::variant(&busybox(), &layout, &["--config.env", &format!("ONLY={name}")]).unwrap();
    let path = format!("/v1/images/import?reference={name}");
    let image = client.post_raw(&path, "application/x-tar", fs::read(pack(&layout, folder.path())).unwrap()).await.expect(201);
    let root = service.place.data_dir.join("images").join(image["digest"].as_str().unwrap().trim_start_matches("sha256:"));
    let lives = "n=$(cat /work/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /work/n; exit $n";
    let asked = json!({ "image": name, "command": ["sh", "-c", lives], "keep_layer": true });
    let sandbox = format!("/v1/sandboxes/{}", client.post("/v1/sandboxes", &asked).await.expect(201)["id"].as_str().unwrap());
    let ended = async || client.until(&sandbox, |sandbox| sandbox["state"] == "exited").await;
    assert_exit(&ended().await, 1);

    assert_eq!(client.delete(&format!("/v1/images/{name}")).await.status, 204);
    client.post(&format!("{sandbox}/start"), &json!({})).await.expect(200);
    assert_exit(&ended().await, 2);
    let stays = root.exists();
    assert_eq!(client.delete(&sandbox).await.status, 204);

    assert!(stays);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    while root.exists() {
        assert!(tokio::time::Instant::now() < deadline, "{} is still there", root.display());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn importing_needs_its_scope() {
    let service = shared();
    let client = Client::with_scope(&service.place, "tenant", "runs images:read");

    let answer = client.post_raw("/v1/images/import?reference=x", "application/x-tar", "x").await;

    let problem = answer.problem(403, "forbidden");
    assert!(problem["detail"].as_str().unwrap().contains("images:write"), "{problem:#}");
}

#[tokio::test]
async fn a_run_names_the_digest_of_its_image() {
    let client = shared().client();
    let image = client.get("/v1/images/busybox").await.expect(200);

    let run = client.shell("true").await;

    assert_eq!(run["image"], json!({ "reference": "busybox", "digest": image["digest"] }));
}

async fn upload(service: &Shared, file: &Path) -> Answer {
    let path = format!("/v1/images/import?reference={}", name());
    service.client().post_raw(&path, "application/x-tar", fs::read(file).expect("the file that the test made")).await
}

/// A layout folder as an OCI archive.
fn pack(layout: &Path, folder: &Path) -> PathBuf {
    let archive = folder.join("packed.tar");
    image::run(Command::new("tar").arg("-C").arg(layout).arg("-cf").arg(&archive).args(["oci-layout", "index.json", "blobs"]))
        .expect("tar");
    archive
}

/// Adds what is in `content` as a layer on top.
fn add_layer(layout: &Path, content: &Path, folder: &Path) {
    let tar = folder.join(format!("{}.tar", uuid::Uuid::new_v4()));
    image::run(Command::new("tar").arg("-C").arg(content).arg("-cf").arg(&tar).arg(".")).expect("tar");
    append(layout, &tar);
}

fn append(layout: &Path, tar: &Path) {
    image::run(Command::new("umoci").args(["raw", "add-layer", "--image", &format!("{}:latest", layout.display())]).arg(tar))
        .expect("umoci");
}

fn largest_blob(layout: &Path) -> PathBuf {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).expect("a layout").flatten();
    blobs.max_by_key(|blob| blob.metadata().map_or(0, |meta| meta.len())).expect("blobs").path()
}
