//! Paths as policies see them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use undermesh::policy::authorization::{EscapedSlashes, PathNormalisation, normalise};

fuzz_target!(|input: &str| {
    for escaped_slashes in [EscapedSlashes::Refuse, EscapedSlashes::Keep, EscapedSlashes::Decode] {
        for (merge_slashes, case_insensitive) in [(true, false), (false, false), (true, true)] {
            let settings = PathNormalisation { merge_slashes, case_insensitive, escaped_slashes };
            let Ok(path) = normalise(input, &settings) else { continue };
            assert_eq!(normalise(&path, &settings).as_deref(), Ok(&*path), "what is normal stays as it is");
            assert!(path == "*" || path.starts_with('/'));
            assert!(!path.contains(['?', '#', '\\']) && path.is_ascii());
            assert!(!path.split('/').any(|segment| matches!(segment, "." | "..")));
            assert!(!merge_slashes || !path.contains("//"));
        }
    }
});
