//! One line per connection and per HTTP request at its end, written by a thread of its own: however slow the output, the proxy never waits.

mod line;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::time::{Duration, Instant, SystemTime};

use super::connection::{Connection, ConnectionFacts};
use super::{CloseReason, HttpRequest, RefuseReason};

/// Lines that may wait for the writer: a second's worth of short connections.
const QUEUE: usize = 16_384;
/// How much is written at once when there is much to write.
const BATCH_BYTES: usize = 64 * 1024;

/// Where the access log goes and how it looks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessLogSettings {
    /// Where to.
    pub output: AccessLogOutput,
    /// In which form.
    pub format: AccessLogFormat,
}

/// Where the access log goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AccessLogOutput {
    /// Nowhere.
    #[default]
    Off,
    /// To standard output.
    Stdout,
    /// To the end of a file, made if it is not there. Rotate it by copying and truncating.
    File(PathBuf),
}

/// How a line of the access log looks. Both forms have the same fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessLogFormat {
    /// One JSON object.
    #[default]
    Json,
    /// `field=value` pairs, quoted where needed (logfmt); fields without a value are left out.
    Text,
}

/// The way into the log. Dropping the last one lets the writer finish what is queued.
#[derive(Debug, Default)]
pub struct AccessLog {
    queue: Option<SyncSender<Message>>,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    /// A log that writes nothing.
    pub fn off() -> Self {
        Self { queue: None, dropped: Arc::default() }
    }

    /// Opens the output and starts the writer.
    ///
    /// # Errors
    /// When the file cannot be opened (the error names it) or no thread can be started.
    pub fn start(settings: &AccessLogSettings) -> io::Result<Self> {
        let output = match &settings.output {
            AccessLogOutput::Off => return Ok(Self::off()),
            // Not `io::stdout()`: whoever else prints would wait for the lock that a blocked writer holds.
            AccessLogOutput::Stdout => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            AccessLogOutput::File(path) => OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?,
        };
        Self::write_to(output, settings.format, QUEUE)
    }

    pub(super) fn write_to(
        output: impl Write + Send + 'static,
        format: AccessLogFormat,
        queue: usize,
    ) -> io::Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(queue);
        let dropped = Arc::new(AtomicU64::new(0));
        let writer =
            Writer { receiver, output, format, dropped: dropped.clone(), failing: AtomicBool::new(false) };
        std::thread::Builder::new().name("access-log".into()).spawn(move || writer.run())?;
        Ok(Self { queue: Some(sender), dropped })
    }

    pub(super) fn is_on(&self) -> bool {
        self.queue.is_some()
    }

    /// Lines that were not written, because the queue was full or the output failed.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn closed(&self, connection: &Arc<Connection>, reason: CloseReason, duration: Duration) {
        self.offer(|at| Message::Closed { connection: connection.clone(), reason, duration, at });
    }

    pub(super) fn refused(&self, facts: ConnectionFacts, reason: RefuseReason) {
        self.offer(|at| Message::Refused { facts: Box::new(facts), reason, at });
    }

    pub(super) fn request(&self, mut request: HttpRequest) {
        self.offer(|at| {
            request.shorten();
            Message::Request { request: Box::new(request), at }
        });
    }

    /// Waits until what is queued has been written, but no longer than this; says whether it has. It blocks.
    pub fn flush(&self, timeout: Duration) -> bool {
        let Some(queue) = &self.queue else { return true };
        let deadline = Instant::now() + timeout;
        let (done, wait) = mpsc::sync_channel(1);
        // Sending could block for ever when the output does.
        while let Err(TrySendError::Full(_)) = queue.try_send(Message::Flush(done.clone())) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // Without our own sender a writer that has died shows at once.
        drop(done);
        wait.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }

    pub(super) fn audited(&self, record: AuditRecord) {
        self.offer(|at| Message::Audit { record: record.shortened(), at });
    }

    fn offer(&self, message: impl FnOnce(SystemTime) -> Message) {
        let Some(queue) = &self.queue else { return };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            queue.try_send(message(SystemTime::now()))
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What the writer is told. Lines are formatted there, not on the proxy's threads.
#[derive(Debug)]
enum Message {
    Closed { connection: Arc<Connection>, reason: CloseReason, duration: Duration, at: SystemTime },
    Refused { facts: Box<ConnectionFacts>, reason: RefuseReason, at: SystemTime },
    Request { request: Box<HttpRequest>, at: SystemTime },
    Audit { record: AuditRecord, at: SystemTime },
    Flush(SyncSender<()>),
}

/// Something that policies have said something notable of.
#[derive(Debug)]
pub(super) enum AuditRecord {
    Connection(Box<ConnectionFacts>),
    Request(Box<HttpRequest>),
}

impl AuditRecord {
    fn shortened(mut self) -> Self {
        if let Self::Request(request) = &mut self {
            request.shorten();
        }
        self
    }
}

struct Writer<W> {
    receiver: Receiver<Message>,
    output: W,
    format: AccessLogFormat,
    dropped: Arc<AtomicU64>,
    failing: AtomicBool,
}

impl<W: Write> Writer<W> {
    /// Ends when the last sender is gone and the queue is empty.
    fn run(mut self) {
        let mut batch = Batch::default();
        while let Ok(message) = self.receiver.recv() {
            let mut next = Some(message);
            while let Some(message) = next {
                match message {
                    Message::Flush(done) => {
                        self.write(&mut batch);
                        let _ = done.try_send(());
                    }
                    line => batch.push(&line, self.format),
                }
                if batch.text.len() >= BATCH_BYTES {
                    self.write(&mut batch);
                }
                next = self.receiver.try_recv().ok();
            }
            self.write(&mut batch);
        }
    }

    fn write(&mut self, batch: &mut Batch) {
        if batch.lines == 0 {
            return;
        }
        match self.output.write_all(batch.text.as_bytes()).and_then(|()| self.output.flush()) {
            Ok(()) => self.failing.store(false, Ordering::Relaxed),
            Err(error) => {
                self.dropped.fetch_add(batch.lines, Ordering::Relaxed);
                // Once per outage: a full disk is not helped by a flood of warnings.
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "the access log cannot be written; lines are dropped and counted");
                }
            }
        }
        *batch = Batch { text: std::mem::take(&mut batch.text), lines: 0 };
        batch.text.clear();
    }
}

#[derive(Default)]
struct Batch {
    text: String,
    lines: u64,
}

impl Batch {
    fn push(&mut self, message: &Message, format: AccessLogFormat) {
        line::write(message, format, &mut self.text);
        self.lines += 1;
    }
}
