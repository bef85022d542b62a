//! Documents of which the last version that could be used stays in force.

use std::sync::Arc;

use crate::config::{FieldPath, Problem};

/// An object in its versions.
#[derive(Debug)]
pub(super) struct LastGood<T> {
    /// As it was last well written.
    document: Option<Arc<T>>,
    /// The version that there is now says something badly.
    is_bad: bool,
}

/// What a new version brings.
#[derive(Debug)]
pub(super) enum Brought<T> {
    /// Nothing.
    Nothing,
    /// It can be used where the one before could not, or the other way round; what is in force is the same.
    Standing,
    /// Something else is in force; what was before.
    Document(Option<Arc<T>>),
}

impl<T> Default for LastGood<T> {
    fn default() -> Self {
        Self { document: None, is_bad: false }
    }
}

impl<T: PartialEq> LastGood<T> {
    /// Takes a version in. One that is not good leaves the one before it in force.
    pub(super) fn put(&mut self, new: &Arc<T>, is_good: bool) -> Brought<T> {
        let was_bad = std::mem::replace(&mut self.is_bad, !is_good);
        match is_good && self.document.as_ref() != Some(new) {
            true => Brought::Document(self.document.replace(new.clone())),
            false if was_bad == is_good => Brought::Standing,
            false => Brought::Nothing,
        }
    }

    /// The object is gone; what was in force.
    pub(super) fn remove(&mut self) -> Option<Arc<T>> {
        self.is_bad = false;
        self.document.take()
    }

    /// What is in force.
    pub(super) fn document(&self) -> Option<&Arc<T>> {
        self.document.as_ref()
    }

    /// Whether nothing is known of it any more.
    pub(super) fn is_gone(&self) -> bool {
        self.document.is_none() && !self.is_bad
    }

    /// Adds what is wrong with there being a version that cannot be used. Other problems, which are of the one in force, then are of
    /// fields that stand elsewhere, or nowhere.
    pub(super) fn tell(&self, what: &str, problems: &mut Vec<Problem>) {
        if !self.is_bad {
            return;
        }
        problems.iter_mut().for_each(|problem| problem.field = FieldPath::default());
        let message = match self.document {
            Some(_) => "this version cannot be used, and the last one that could stays in force".into(),
            None => format!(
                "this version cannot be used, and there was none before it: the {what} is not in force"
            ),
        };
        problems.insert(0, Problem::new(FieldPath::default(), message));
    }
}
