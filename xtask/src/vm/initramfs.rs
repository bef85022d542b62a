//! The VM's first file system: busybox, two scripts, the command, and the modules without which this machine's files
//! cannot be seen.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::command::command;
use crate::setup::kernel::{Kernel, busybox};

/// The modules that [`INIT`] loads before the machine's files are there.
const MODULES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];

const INIT: &str = include_str!("init.sh");
const MAIN: &str = include_str!("main.sh");

/// A cpio archive, in a file that has no name and so leaves nothing behind. `script` is the command's, for busybox sh.
pub fn build(kernel: &Kernel, script: &str) -> Result<File> {
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    add(root, "bin/busybox", &fs::read(busybox()?)?)?;
    add(root, "init", INIT.as_bytes())?;
    add(root, "main.sh", MAIN.as_bytes())?;
    add(root, "command.sh", script.as_bytes())?;
    let modules = kernel.modules();
    add(root, "settings", format!("MODULES={}\n", quoted(&modules.display().to_string())).as_bytes())?;
    for file in needed(&modules)? {
        let path = format!("lib/modules/{}/{file}", kernel.release);
        add(root, &path, &fs::read(modules.join(&file))?)?;
    }
    archive(root)
}

/// A word for sh.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn add(root: &Path, path: &str, bytes: &[u8]) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = root.join(path);
    fs::create_dir_all(path.parent().context("a folder")?)?;
    let mut file = File::options().write(true).create_new(true).mode(0o755).open(&path)?;
    Ok(file.write_all(bytes)?)
}

/// The modules with those that they need, and the tables.
fn needed(modules: &Path) -> Result<Vec<String>> {
    let table = fs::read_to_string(modules.join("modules.dep"))?;
    let mut files = vec!["modules.dep".to_owned(), "modules.alias".to_owned(), "modules.symbols".to_owned()];
    for line in table.lines() {
        let (file, needs) = line.split_once(':').context("a line without a colon in modules.dep")?;
        let name = Path::new(file).file_name().unwrap_or_default().to_string_lossy();
        if MODULES.iter().any(|module| name.strip_prefix(module).is_some_and(|rest| rest.starts_with(".ko")))
        {
            files.push(file.to_owned());
            files.extend(needs.split_whitespace().map(str::to_owned));
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

fn archive(root: &Path) -> Result<File> {
    let mut archive = tempfile::tempfile()?;
    let mut find = command(busybox()?);
    let mut find = find.args(["find", "."]).current_dir(root).stdout(Stdio::piped()).spawn()?;
    let mut cpio = command(busybox()?);
    cpio.args(["cpio", "--quiet", "-o", "-H", "newc"]).current_dir(root);
    cpio.stdin(find.stdout.take().context("a pipe")?).stdout(archive.try_clone()?);
    ensure!(cpio.status()?.success() && find.wait()?.success(), "cpio failed");
    archive.rewind()?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
