//! A place in a document that is being read, and where problems with it go; and the values that stand in many places.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::time::Duration;

use http::HeaderName;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::super::{FieldPath, Problem};

/// A field of a document that is being read.
#[derive(Clone, Debug)]
pub(super) struct Place<'a> {
    field: FieldPath,
    problems: &'a RefCell<Vec<Problem>>,
}

impl<'a> Place<'a> {
    /// The document's root.
    pub(super) fn root(problems: &'a RefCell<Vec<Problem>>) -> Self {
        Self { field: FieldPath::default(), problems }
    }

    pub(super) fn key(&self, key: &str) -> Self {
        Self { field: self.field.clone().key(key), ..*self }
    }

    pub(super) fn index(&self, index: usize) -> Self {
        Self { field: self.field.clone().index(index), ..*self }
    }

    pub(super) fn field(&self) -> FieldPath {
        self.field.clone()
    }

    /// The elements of a list that may be missing, with their places.
    pub(super) fn each<'t, T>(
        &self,
        key: &str,
        list: &'t Option<Vec<T>>,
    ) -> impl Iterator<Item = (Self, &'t T)> + use<'a, 't, T> {
        let place = self.key(key);
        list.iter().flatten().enumerate().map(move |(index, item)| (place.index(index), item))
    }

    /// The same of a list that is not to be long.
    pub(super) fn few<'t, T>(
        &self,
        key: &str,
        list: &'t Option<Vec<T>>,
        most: usize,
    ) -> impl Iterator<Item = (Self, &'t T)> + use<'a, 't, T> {
        let found = list.as_ref().map_or(0, Vec::len);
        if found > most {
            self.key(key).refuse(format!("expected {most} at most, found {found}"));
        }
        self.each(key, list)
    }

    /// The same of a list that is there with something in it or not at all: one that has been emptied would mean anything.
    pub(super) fn some<'t, T>(
        &self,
        key: &str,
        list: &'t Option<Vec<T>>,
        most: usize,
    ) -> impl Iterator<Item = (Self, &'t T)> + use<'a, 't, T> {
        if list.as_ref().is_some_and(Vec::is_empty) {
            self.key(key).refuse("expected at least one, or no such field");
        }
        self.few(key, list, most)
    }

    /// The same place, with problems of its own.
    pub(super) fn apart<'b>(&self, problems: &'b RefCell<Vec<Problem>>) -> Place<'b> {
        Place { field: self.field.clone(), problems }
    }

    /// Passes on what has been found apart.
    pub(super) fn add(&self, problem: Problem) {
        self.problems.borrow_mut().push(problem);
    }

    /// Says what is wrong here.
    pub(super) fn refuse(&self, message: impl Into<String>) {
        self.add(Problem::new(self.field(), message));
    }

    /// Says what was expected here.
    pub(super) fn expected(&self, what: &str, found: impl std::fmt::Debug) {
        self.refuse(format!("expected {what}, found {found:?}"));
    }

    /// The value, or nothing and what is wrong with it.
    pub(super) fn take<T, E: std::fmt::Display>(&self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.refuse(error.to_string())).ok()
    }

    /// A whole number within bounds.
    pub(super) fn number<T: TryFrom<i64>>(&self, number: i64, bounds: RangeInclusive<i64>) -> Option<T> {
        match T::try_from(number) {
            Ok(value) if bounds.contains(&number) => Some(value),
            _ => {
                self.refuse(format!("expected {} to {}, found {number}", bounds.start(), bounds.end()));
                None
            }
        }
    }

    pub(super) fn port(&self, port: i64) -> Option<u16> {
        match u16::try_from(port) {
            Ok(port) if port != 0 => Some(port),
            _ => {
                self.refuse(format!("expected a port from 1 to 65535, found {port}"));
                None
            }
        }
    }

    /// A duration as GEP-2257 has it: `1h30m`, `250ms`. None where it is zero too, which switches off what it is for.
    pub(super) fn duration(&self, text: &str) -> Option<Duration> {
        let duration = duration(text);
        if duration.is_none() {
            self.expected("a duration such as 500ms, 10s or 1h30m", text);
        }
        duration.filter(|duration| !duration.is_zero())
    }

    /// The duration of a member, if it has one.
    pub(super) fn duration_of(&self, key: &str, text: &Option<String>) -> Option<Duration> {
        self.key(key).duration(text.as_ref()?)
    }

    /// A duration of no less and no more than this.
    pub(super) fn duration_within(&self, text: &str, bounds: RangeInclusive<Duration>) -> Option<Duration> {
        let read = duration(text).filter(|duration| bounds.contains(duration));
        if read.is_none() {
            let (least, most) = (shown(*bounds.start()), shown(*bounds.end()));
            self.expected(&format!("a duration such as 500ms, 10s or 1h30m, from {least} to {most}"), text);
        }
        read
    }

    pub(super) fn header_name(&self, text: &str) -> Option<HeaderName> {
        let name = HeaderName::from_bytes(text.as_bytes()).ok();
        if name.is_none() {
            self.expected("the name of a header", text);
        }
        name
    }

    /// Reads the value under the key, and refuses the fields of it that nobody knows.
    pub(super) fn typed<T: DeserializeOwned>(&self, value: &Value) -> Option<T> {
        let mut track = serde_path_to_error::Track::new();
        let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
        let unknown = |path: serde_ignored::Path<'_>| {
            let mut field = self.field();
            extend(&mut field, &path);
            let problem =
                Problem::new(field, "there is no such field, or this version of Undermesh does not know it");
            self.problems.borrow_mut().push(problem);
        };
        match serde_ignored::deserialize(deserializer, unknown) {
            Ok(typed) => Some(typed),
            Err(error) => {
                let problem = Problem::of_type(&FieldPath::from(&track.path()), &error);
                let field = FieldPath(self.field.0.iter().chain(&problem.field.0).cloned().collect());
                self.problems.borrow_mut().push(Problem { field, ..problem });
                None
            }
        }
    }
}

fn extend(field: &mut FieldPath, path: &serde_ignored::Path<'_>) {
    use serde_ignored::Path as Step;
    let next = match path {
        Step::Root => return,
        Step::Seq { parent, index } => {
            extend(field, parent);
            field.clone().index(*index)
        }
        Step::Map { parent, key } => {
            extend(field, parent);
            field.clone().key(key)
        }
        Step::Some { parent } | Step::NewtypeStruct { parent } | Step::NewtypeVariant { parent } => {
            return extend(field, parent);
        }
    };
    *field = next;
}

/// `^([0-9]{1,5}(h|m|s|ms)){1,4}$`.
fn duration(text: &str) -> Option<Duration> {
    let (mut rest, mut total, mut parts) = (text, Duration::ZERO, 0);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = rest.split_at(digits);
        let length = unit.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = unit.split_at(length);
        let milliseconds = match unit {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            _ => return None,
        };
        parts += 1;
        if !(1..=5).contains(&digits) || parts > 4 {
            return None;
        }
        total += Duration::from_millis(number.parse::<u64>().ok()? * milliseconds);
        rest = after;
    }
    (parts > 0).then_some(total)
}

fn shown(duration: Duration) -> String {
    match (duration.as_secs(), duration.subsec_millis()) {
        (seconds, 0) if seconds > 0 && seconds.is_multiple_of(3_600) => format!("{}h", seconds / 3_600),
        (seconds, 0) => format!("{seconds}s"),
        _ => format!("{}ms", duration.as_millis()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, milliseconds) in
            [("0s", 0), ("10s", 10_000), ("1h30m", 5_400_000), ("1h2m3s4ms", 3_723_004), ("99999ms", 99_999)]
        {
            assert_eq!(duration(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in
            ["", "1", "s", "1d", "-1s", "1.5s", "100000s", "1h1m1s1ms1s", " 1s", "1s ", "1S", "1\u{664}s"]
        {
            assert_eq!(duration(text), None, "{text}");
        }
    }
}
