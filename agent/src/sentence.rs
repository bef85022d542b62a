//! An error as a sentence: what failed, and then why, and nothing twice.

use std::error::Error;

/// The error and its causes, each after a colon, without those that the text before them says already.
pub(crate) fn in_one_sentence(error: &dyn Error) -> String {
    let mut sentence = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !sentence.contains(&text) {
            sentence = format!("{sentence}: {text}");
        }
        next = cause.source();
    }
    sentence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("connection refused")
            .context("dialling 10.0.0.1: connection refused")
            .context("asking the authority");
        let sentence = in_one_sentence(error.as_ref());
        assert_eq!(sentence, "asking the authority: dialling 10.0.0.1: connection refused");
    }
}
