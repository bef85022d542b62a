//! The product's own image: the program and the libraries that it is linked with, and nothing else; no shell, nobody to
//! install anything. It knows nothing of how the program is built.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::image::{Image, Layer};
use crate::lab::run_here;

/// The image's name, as the chart has it.
pub const IMAGE: &str = concat!("localhost/undermesh:", env!("CARGO_PKG_VERSION"));

/// Where the program is in the image.
const PROGRAM: &str = "/usr/bin/undermesh";

/// Who runs it unless the pod says otherwise, as it does for the agent. There is no file of users to name it in.
const USER: &str = "65532:65532";

/// Names are looked up in the pod's own file first. The libraries need no other configuration.
const LOOK_UP: (&str, &str) = ("/etc/nsswitch.conf", "hosts: files dns\n");

/// A file of the image, from its root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProductFile {
    /// Its path in the image.
    pub path: PathBuf,
    /// What the path leads to on this machine, or its text.
    pub content: Content,
}

/// What a file is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A program or a library of this machine.
    Executable(PathBuf),
    /// A text.
    Text(&'static str),
}

/// The image of the program.
pub fn image(name: &str, program: &Path) -> Result<Image> {
    // The libraries change seldom: a node that has them from an earlier release fetches the program alone.
    let (mut libraries, mut upper) = (Layer::default(), Layer::default());
    for ProductFile { path, content } in files(program)? {
        let path = path.to_str().context("a library with a strange name")?.to_owned();
        match content {
            Content::Executable(from) if path == PROGRAM => upper = upper.file(&path, 0o755, &from)?,
            Content::Executable(from) => libraries = libraries.file(&path, 0o755, &from)?,
            Content::Text(text) => libraries = libraries.text(&path, 0o644, text)?,
        }
    }
    let labels = [
        ("org.opencontainers.image.title", "Undermesh"),
        ("org.opencontainers.image.licenses", "Apache-2.0"),
    ];
    let image = Image::new(name).layer(libraries).layer(upper);
    Ok(image.entrypoint(&[PROGRAM]).user(USER).labels(&labels))
}

/// Everything in the image: the libraries in the order of their paths, then the program.
pub fn files(program: &Path) -> Result<Vec<ProductFile>> {
    let executable = |path: PathBuf, from: &Path| -> Result<ProductFile> {
        let from = fs::canonicalize(from).with_context(|| format!("no {}", from.display()))?;
        Ok(ProductFile { path, content: Content::Executable(from) })
    };
    let mut files = Vec::new();
    for library in libraries(program)? {
        files.push(executable(library.clone(), &library)?);
    }
    files.push(ProductFile { path: LOOK_UP.0.into(), content: Content::Text(LOOK_UP.1) });
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.push(executable(PROGRAM.into(), program)?);
    Ok(files)
}

/// The shared libraries of a program, its loader among them, by the paths at which the loader looks for them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    let told = run_here(ldd, Duration::from_secs(30))?.success()?;
    let found = told.lines().filter_map(|line| library(line).transpose()).collect::<Result<Vec<_>>>()?;
    ensure!(!found.is_empty(), "ldd names no library of {}: {told}", program.display());
    Ok(found)
}

/// The path in a line of `ldd`; none where there is no file.
fn library(line: &str) -> Result<Option<PathBuf>> {
    let words: Vec<_> = line.split_whitespace().collect();
    let path = match words.as_slice() {
        [name, "=>", "not", "found"] => bail!("the library {name} is not on this machine"),
        [_, "=>", path, ..] => path,
        // The loader has no other name than its path; the kernel's own library has no file.
        [path, ..] => path,
        [] => return Ok(None),
    };
    Ok(path.starts_with('/').then(|| path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_off_ldd() {
        let path = |line| library(line).unwrap().map(|path| path.display().to_string());
        let libc = "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007fc8eb61e000)";
        assert_eq!(path(libc).as_deref(), Some("/lib/x86_64-linux-gnu/libc.so.6"));
        let loader = "\t/lib64/ld-linux-x86-64.so.2 (0x00007fc8ec860000)";
        assert_eq!(path(loader).as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(path("\tlinux-vdso.so.1 (0x00007fc8ec85e000)"), None);
        assert_eq!(path("\tstatically linked"), None);
        assert!(library("\tlibgone.so.1 => not found").is_err());
    }

    #[test]
    fn the_image_has_the_program_its_libraries_and_no_shell() {
        // This very program is linked as the product is.
        let program = std::env::current_exe().unwrap();
        let paths: Vec<_> =
            files(&program).unwrap().into_iter().map(|file| file.path.display().to_string()).collect();
        assert_eq!(paths.last().map(String::as_str), Some(PROGRAM));
        for part in ["libc.so.6", "ld-linux", "/etc/nsswitch.conf"] {
            assert!(paths.iter().any(|path| path.contains(part)), "{paths:?} lacks {part}");
        }
        assert!(!paths.iter().any(|path| path.ends_with("/sh")), "{paths:?}");
        let write = || {
            let tar = tempfile::NamedTempFile::new().unwrap();
            image(IMAGE, &program).unwrap().write(tar.path()).unwrap();
            fs::read(tar.path()).unwrap()
        };
        assert_eq!(write(), write());
    }
}
