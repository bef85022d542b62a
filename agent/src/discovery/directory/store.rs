//! The objects of all files: which version of each is in force, and what is rejected.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::manifest::{Object, Text};
use crate::config::{Change, Document, Key, Position, Problem, Rejection};

/// What the files say, and what holds instead where they say it badly.
#[derive(Debug, Default)]
pub(super) struct Store {
    files: BTreeMap<PathBuf, File>,
    /// Where each object is defined. The first place is in force: whoever comes later is the duplicate.
    places: HashMap<Key, Vec<Place>>,
    /// Objects with more than one place.
    contested: BTreeSet<Key>,
    /// Files with rejections of their own: a change costs no look at all the others.
    flawed: BTreeSet<PathBuf>,
    /// What concerns directories and files as a whole.
    unreadable: BTreeMap<PathBuf, Rejection>,
}

#[derive(Debug, Default)]
struct File {
    held: Vec<Held>,
    /// Of broken documents that can no longer be told.
    rejections: Vec<Rejection>,
    objects: usize,
}

/// An object of a file, as it was last well written there.
#[derive(Debug)]
struct Held {
    key: Key,
    position: Position,
    document: Document,
    rejections: Vec<Rejection>,
    text: Option<Text>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    file: PathBuf,
    position: Position,
    /// Among what the file holds.
    index: usize,
}

impl Store {
    /// Puts the files as they are now in the place of what was known of them; none where a file is gone. The answer is
    /// what that changes of the documents in force.
    pub(super) fn update(
        &mut self,
        files: impl IntoIterator<Item = (PathBuf, Option<Vec<Object>>)>,
    ) -> Vec<Change> {
        // First out with the old: an object that moved from one file to another is no duplicate.
        let mut touched = HashSet::new();
        let mut last_good = HashMap::new();
        let mut come = Vec::new();
        for (path, objects) in files {
            let old = self.files.remove(&path).unwrap_or_default();
            self.flawed.remove(&path);
            let kept =
                objects.as_ref().map(|objects| objects.iter().filter_map(|it| it.key.clone()).collect());
            let kept: HashSet<Key> = kept.unwrap_or_default();
            for held in &old.held {
                touched.insert(held.key.clone());
                if !kept.contains(&held.key) {
                    self.leave(&held.key, &path);
                }
            }
            for held in &old.held {
                last_good.entry(held.key.clone()).or_insert_with(|| held.document.clone());
            }
            if let Some(objects) = objects {
                come.push((path, old, objects));
            }
        }
        for (path, old, objects) in come {
            let file = self.settle(&path, old, objects, &last_good);
            for held in &file.held {
                touched.insert(held.key.clone());
            }
            self.take_places(&path, &file);
            if !file.rejections.is_empty() || file.held.iter().any(|held| !held.rejections.is_empty()) {
                self.flawed.insert(path.clone());
            }
            self.files.insert(path, file);
        }
        touched.into_iter().map(|key| self.change_of(key)).collect()
    }

    /// Notes that this file or directory cannot be read; what was known of it stays in force.
    pub(super) fn set_unreadable(&mut self, rejection: Rejection) {
        self.unreadable.insert(rejection.file.clone(), rejection);
    }

    /// Drops such notes.
    pub(super) fn retain_unreadable(&mut self, mut keep: impl FnMut(&Path) -> bool) {
        self.unreadable.retain(|path, _| keep(path));
    }

    /// What is rejected now, sorted by place. `problems` are those of objects in force that only the others make.
    pub(super) fn rejections(&self, problems: &BTreeMap<Key, Vec<Problem>>) -> Vec<Rejection> {
        let mut rejections: Vec<Rejection> = self.unreadable.values().cloned().collect();
        for file in self.flawed.iter().filter_map(|path| self.files.get(path)) {
            rejections.extend(file.rejections.iter().cloned());
            rejections.extend(file.held.iter().flat_map(|held| held.rejections.iter().cloned()));
        }
        for (key, problems) in problems {
            let place = self.places.get(key).and_then(|places| places.first());
            let Some((place, held)) = place.and_then(|place| Some((place, self.held(place)?))) else {
                continue;
            };
            let locate = |problem: &Problem| match &held.text {
                Some(text) => text.locate(&problem.field),
                None => held.position,
            };
            rejections.extend(problems.iter().map(|problem| Rejection {
                file: place.file.clone(),
                position: Some(locate(problem)),
                object: Some(key.clone()),
                field: problem.field.clone(),
                message: problem.message.clone(),
            }));
        }
        for key in &self.contested {
            let Some([first, others @ ..]) = self.places.get(key).map(Vec::as_slice) else { continue };
            rejections.extend(others.iter().map(|place| Rejection {
                file: place.file.clone(),
                position: Some(place.position),
                object: Some(key.clone()),
                field: Default::default(),
                message: format!(
                    "expected each object once, but {}:{} has it too and is in force",
                    first.file.display(),
                    first.position.line
                ),
            }));
        }
        rejections.sort();
        rejections.dedup();
        rejections
    }

    /// How many objects the files have, good and bad.
    pub(super) fn objects(&self) -> usize {
        self.files.values().map(|file| file.objects).sum()
    }

    /// What of the file is in force: its objects as they are now, or where one is broken as it was before.
    fn settle(
        &self,
        path: &Path,
        old: File,
        objects: Vec<Object>,
        last_good: &HashMap<Key, Document>,
    ) -> File {
        let mut file = File { objects: objects.len(), ..File::default() };
        let mut cannot_tell = false;
        for object in objects {
            let Some(key) = object.key else {
                cannot_tell = true;
                file.rejections.extend(object.rejections);
                continue;
            };
            match object.document.or_else(|| last_good.get(&key).cloned()) {
                Some(document) => file.held.push(Held {
                    key,
                    position: object.position,
                    document,
                    rejections: object.rejections,
                    text: object.text,
                }),
                None => file.rejections.extend(object.rejections),
            }
        }
        if cannot_tell {
            // One of those that are missing now, or none of them: whichever it is, it stays.
            let here: HashSet<&Key> = file.held.iter().map(|held| &held.key).collect();
            let stays = |held: &Held| {
                let places = self.places.get(&held.key);
                let is_elsewhere = places.is_some_and(|places| places.iter().any(|it| it.file != path));
                !here.contains(&held.key) && !is_elsewhere
            };
            let stay: Vec<Held> = old.held.into_iter().filter(stays).collect();
            file.held.extend(stay.into_iter().map(|held| Held { rejections: Vec::new(), ..held }));
        }
        file
    }

    /// Notes where the file's objects are now. An object keeps its turn among its places.
    fn take_places(&mut self, path: &Path, file: &File) {
        let mut now: HashMap<&Key, Vec<Place>> = HashMap::new();
        for (index, held) in file.held.iter().enumerate() {
            let place = Place { file: path.to_owned(), position: held.position, index };
            now.entry(&held.key).or_default().push(place);
        }
        for (key, now) in now {
            let places = self.places.entry(key.clone()).or_default();
            let turn = places.iter().position(|it| it.file == path).unwrap_or(places.len());
            places.retain(|it| it.file != path);
            places.splice(turn..turn, now);
            if places.len() > 1 {
                self.contested.insert(key.clone());
            } else {
                self.contested.remove(key);
            }
        }
    }

    fn leave(&mut self, key: &Key, path: &Path) {
        if let Some(places) = self.places.get_mut(key) {
            places.retain(|place| place.file != path);
            if places.len() < 2 {
                self.contested.remove(key);
            }
            if places.is_empty() {
                self.places.remove(key);
            }
        }
    }

    fn change_of(&self, key: Key) -> Change {
        let in_force =
            self.places.get(&key).and_then(|places| places.first()).and_then(|place| self.held(place));
        match in_force {
            Some(held) => Change::Put(held.document.clone()),
            None => Change::Remove(key),
        }
    }

    fn held(&self, place: &Place) -> Option<&Held> {
        self.files.get(&place.file)?.held.get(place.index)
    }
}
