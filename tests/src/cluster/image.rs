//! Container images as tars, made without a daemon: what `ctr images import`, `docker load` and `podman load` read.
//!
//! The same content makes the same bytes: no clock, no names of this machine. It knows nothing of registries, and
//! nothing of what is in an image.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::HEXLOWER;
use serde_json::{Value, json};

/// An image to be: its name, its layers from the lowest up, and how it is run.
pub struct Image {
    name: String,
    layers: Vec<Layer>,
    run: serde_json::Map<String, Value>,
}

impl Image {
    /// An empty image. The name has a tag, and a registry's host if it is to have one, as `pod.spec.image` says it.
    pub fn new(name: impl Into<String>) -> Self {
        let mut run = serde_json::Map::new();
        run.insert(
            "Env".into(),
            json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]),
        );
        Self { name: name.into(), layers: Vec::new(), run }
    }

    /// Puts a layer on top.
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// The program that is run, with its first arguments.
    pub fn entrypoint(self, words: &[&str]) -> Self {
        self.set("Entrypoint", json!(words))
    }

    /// The arguments that `pod.spec.containers.args` replaces.
    pub fn command(self, words: &[&str]) -> Self {
        self.set("Cmd", json!(words))
    }

    /// Who runs it, as numbers: `65532:65532`.
    pub fn user(self, user: &str) -> Self {
        self.set("User", json!(user))
    }

    /// What its makers say of it, as `org.opencontainers.image.source`.
    pub fn labels(self, labels: &[(&str, &str)]) -> Self {
        let labels: serde_json::Map<_, _> = labels.iter().map(|(k, v)| ((*k).into(), json!(v))).collect();
        self.set("Labels", labels.into())
    }

    /// Writes the tar: an OCI layout, and beside its index the one that older Dockers read.
    pub fn write(self, path: &Path) -> Result<()> {
        if !self.name.rsplit('/').next().is_some_and(|last| last.contains(':')) {
            bail!("the image's name `{}` has no tag", self.name);
        }
        let architecture = architecture()?;
        let mut blobs = Vec::new();
        let mut add = |kind: &str, bytes: Vec<u8>| {
            let blob = Blob::new(bytes);
            let described = json!({ "mediaType": kind, "digest": format!("sha256:{}", blob.digest),
                "size": blob.bytes.len() });
            blobs.push(blob);
            described
        };
        let mut layers = Vec::new();
        for layer in self.layers {
            layers.push(add("application/vnd.oci.image.layer.v1.tar", layer.finish()?));
        }
        // Layers are not compressed, so their digest is also that of their content.
        let contents: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
        let config = json!({ "architecture": architecture, "os": "linux", "config": self.run,
            "rootfs": { "type": "layers", "diff_ids": contents } });
        let config = add("application/vnd.oci.image.config.v1+json", serde_json::to_vec(&config)?);
        let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers });
        let mut entry = add("application/vnd.oci.image.manifest.v1+json", serde_json::to_vec(&manifest)?);
        entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
        entry["annotations"] = json!({ "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name });
        let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry] });
        let for_docker = json!([{ "Config": blob_path(&config), "RepoTags": [self.name],
            "Layers": layers.iter().map(blob_path).collect::<Vec<_>>() }]);

        let file = File::create(path).with_context(|| format!("{} cannot be made", path.display()))?;
        let mut tar = Layer { tar: tar::Builder::new(BufWriter::new(file)) };
        tar.add_file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        tar.add_file("index.json", 0o644, &serde_json::to_vec(&index)?)?;
        tar.add_file("manifest.json", 0o644, &serde_json::to_vec(&for_docker)?)?;
        // Two layers may be the same.
        blobs.sort_by(|a, b| a.digest.cmp(&b.digest));
        blobs.dedup_by(|a, b| a.digest == b.digest);
        for blob in blobs {
            tar.add_file(&format!("blobs/sha256/{}", blob.digest), 0o644, &blob.bytes)?;
        }
        tar.tar.into_inner()?.flush()?;
        Ok(())
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.run.insert(key.into(), value);
        self
    }
}

/// A layer of files, each root's and from the epoch. Paths are those in the container, from its root; folders above a
/// file are made by whoever unpacks it.
pub struct Layer<W: Write = Vec<u8>> {
    tar: tar::Builder<W>,
}

impl Default for Layer {
    fn default() -> Self {
        Self { tar: tar::Builder::new(Vec::new()) }
    }
}

impl Layer {
    /// A file of this machine.
    pub fn file(mut self, path: &str, mode: u32, from: &Path) -> Result<Self> {
        let bytes = fs::read(from).with_context(|| format!("no {} for an image", from.display()))?;
        self.add_file(path, mode, &bytes)?;
        Ok(self)
    }

    /// A file of this text.
    pub fn text(mut self, path: &str, mode: u32, text: &str) -> Result<Self> {
        self.add_file(path, mode, text.as_bytes())?;
        Ok(self)
    }

    /// An empty folder.
    pub fn directory(mut self, path: &str, mode: u32) -> Result<Self> {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        self.tar.append_data(&mut header, relative(path), std::io::empty())?;
        Ok(self)
    }

    /// A symbolic link.
    pub fn link(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = header(tar::EntryType::Symlink, 0o777, 0);
        self.tar.append_link(&mut header, relative(path), target)?;
        Ok(self)
    }

    fn finish(self) -> Result<Vec<u8>> {
        Ok(self.tar.into_inner()?)
    }
}

impl<W: Write> Layer<W> {
    fn add_file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let mut header = header(tar::EntryType::Regular, mode, bytes.len() as u64);
        self.tar.append_data(&mut header, relative(path), bytes)?;
        Ok(())
    }
}

/// The name of the image in a tar.
pub fn name_of(tar: &Path) -> Result<String> {
    let file = File::open(tar).with_context(|| format!("no {}", tar.display()))?;
    for entry in tar::Archive::new(file).entries()? {
        let entry = entry?;
        if entry.path()? == Path::new("manifest.json") {
            let manifest: Value = serde_json::from_reader(entry)?;
            return Ok(manifest[0]["RepoTags"][0].as_str().unwrap_or_default().to_owned());
        }
    }
    bail!("{} is no image", tar.display())
}

/// The digest as one writes it.
pub fn sha256(bytes: &[u8]) -> String {
    HEXLOWER.encode(digest(&SHA256, bytes).as_ref())
}

struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        Self { digest: sha256(&bytes), bytes }
    }
}

fn blob_path(described: &Value) -> String {
    format!("blobs/{}", described["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

fn relative(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// This machine's architecture in the words of the image specification, which are Go's.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no images are made for {other}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;

    #[test]
    fn the_same_content_makes_the_same_bytes() {
        assert_eq!(image_bytes(), image_bytes());
    }

    #[test]
    fn everything_that_is_pointed_to_is_there() {
        let bytes = image_bytes();
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(name, content);
        }
        let read = |name: &str| serde_json::from_slice::<Value>(&files[name]).unwrap();
        let manifest = read(&blob_path(&read("index.json")["manifests"][0]));
        let config = read(&blob_path(&manifest["config"]));
        assert_eq!(config["config"]["Entrypoint"], json!(["/bin/hello"]));
        let layer = &files[&blob_path(&manifest["layers"][0])];
        assert_eq!(manifest["layers"][0]["size"], json!(layer.len()));
        assert_eq!(manifest["layers"][0]["digest"], config["rootfs"]["diff_ids"][0]);
        let docker = &read("manifest.json")[0];
        assert_eq!(docker["RepoTags"][0], "um.test/hello:1");
        assert_eq!(docker["Config"], json!(blob_path(&manifest["config"])));
    }

    fn image_bytes() -> Vec<u8> {
        let layer = Layer::default().text("/bin/hello", 0o755, "#!/bin/sh\necho hello\n").unwrap();
        let layer = layer.directory("/tmp", 0o1777).unwrap().link("/bin/hi", "hello").unwrap();
        let path = tempfile::NamedTempFile::new().unwrap();
        Image::new("um.test/hello:1").layer(layer).entrypoint(&["/bin/hello"]).write(path.path()).unwrap();
        assert_eq!(name_of(path.path()).unwrap(), "um.test/hello:1");
        fs::read(path.path()).unwrap()
    }
}
