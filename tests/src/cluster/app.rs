//! What the tests run in pods, as an image: the traffic program, and a shell beside it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::image::{Image, Layer};
use super::product::{self, Content};
use crate::lab::run_here;

/// The image's name.
pub const APP: &str = "um.test/app:1";

/// Where the program is in it.
pub const TRAFFIC: &str = "/usr/bin/traffic";

/// Where the program is in it that speaks HTTP.
pub const REQUESTS: &str = "/usr/bin/requests";

/// Writes the images of the product and of the tests' own programs into a folder, as tars. All are built in the other folder.
pub fn write_images(folder: &Path, programs: &Path) -> Result<[PathBuf; 2]> {
    let stripped = tempfile::tempdir()?;
    let strip = |name: &str| -> Result<PathBuf> {
        let to = stripped.path().join(name);
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(&to).arg(programs.join(name));
        run_here(strip, Duration::from_secs(60))?.success()?;
        Ok(to)
    };
    let tars = [folder.join("undermesh.tar"), folder.join("app.tar")];
    product::image(product::IMAGE, &strip("undermesh")?)?.write(&tars[0])?;
    image(&strip("traffic")?, &strip("requests")?)?.write(&tars[1])?;
    Ok(tars)
}

/// The second program needs no library that the first does not.
fn image(traffic: &Path, requests: &Path) -> Result<Image> {
    let mut layer = Layer::default().file("/bin/busybox", 0o755, Path::new("/bin/busybox"))?;
    layer = layer.link("/bin/sh", "busybox")?;
    for file in product::files(traffic)? {
        if let (Some(path), Content::Executable(from)) = (file.path.to_str(), &file.content) {
            // The program is named after the product there.
            let path = if path.ends_with("/undermesh") { TRAFFIC } else { path };
            layer = layer.file(path, 0o755, from)?;
        }
    }
    Ok(Image::new(APP).layer(layer.file(REQUESTS, 0o755, requests)?))
}
