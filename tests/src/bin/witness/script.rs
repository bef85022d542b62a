//! What to do with a connection, step by step, and what was seen at each step.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

use crate::socket::errno;

/// Longest wait of a step for the other side.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A socket that takes nothing for this long is full.
const FULL_AFTER: Duration = Duration::from_secs(1);

const CHUNK: usize = 64 * 1024;

/// Steps, separated by commas.
#[derive(Clone, Debug)]
pub struct Script(Vec<Step>);

#[derive(Clone, Debug)]
enum Step {
    /// `say:TEXT`: sends it.
    Say(String),
    /// `greet`: sends the server's view of the connection as a line.
    Greet,
    /// `tell-congestion`: sends the name of the own congestion control as a line.
    TellCongestion,
    /// `urgent:TEXT`: sends it out of band (MSG_OOB).
    Urgent(String),
    /// `hear:N`: waits for so many bytes.
    Hear(usize),
    /// `hear-line`: waits for a line.
    HearLine,
    /// `hear-end`: reads until the stream ends or breaks.
    HearEnd,
    /// `echo`: sends back what comes until the stream ends.
    Echo,
    /// `shut`: ends the own stream, goes on reading.
    Shut,
    /// `reset`: closes with a RST.
    Reset,
    /// `broken`: waits, without reading or writing, until the kernel reports an error.
    Broken,
    /// `pause:MS`.
    Pause(Duration),
    /// `gate:PATH`: waits for the file.
    Gate(PathBuf),
    /// `mark:PATH`: makes the file, so that others know that it came this far.
    Mark(PathBuf),
    /// `pour:BYTES:SEED`: sends so many bytes of a pattern.
    Pour(u64, u64),
    /// `drain:BYTES:SEED`: receives and verifies so many bytes of a pattern.
    Drain(u64, u64),
    /// `exchange:BYTES:OWN:THEIRS`: both at once.
    Exchange(u64, u64, u64),
    /// `stuff:SEED`: sends the pattern until the socket is full.
    Stuff(u64),
    /// `fill:SEED`: the same, and does not tell how much it took.
    Fill(u64),
    /// `drain-all:SEED`: receives and verifies the pattern until the stream ends.
    DrainAll(u64),
}

impl FromStr for Script {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        text.split(',').map(Step::from_str).collect::<Result<_, _>>().map(Self)
    }
}

impl FromStr for Step {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut words = text.split(':');
        let name = words.next().unwrap_or_default();
        let mut word = || words.next().with_context(|| format!("`{text}` lacks an argument"));
        Ok(match name {
            "say" => Self::Say(word()?.to_owned()),
            "greet" => Self::Greet,
            "tell-congestion" => Self::TellCongestion,
            "urgent" => Self::Urgent(word()?.to_owned()),
            "hear" => Self::Hear(word()?.parse()?),
            "hear-line" => Self::HearLine,
            "hear-end" => Self::HearEnd,
            "echo" => Self::Echo,
            "shut" => Self::Shut,
            "reset" => Self::Reset,
            "broken" => Self::Broken,
            "pause" => Self::Pause(Duration::from_millis(word()?.parse()?)),
            "gate" => Self::Gate(word()?.into()),
            "mark" => Self::Mark(word()?.into()),
            "pour" => Self::Pour(word()?.parse()?, word()?.parse()?),
            "drain" => Self::Drain(word()?.parse()?, word()?.parse()?),
            "exchange" => Self::Exchange(word()?.parse()?, word()?.parse()?, word()?.parse()?),
            "stuff" => Self::Stuff(word()?.parse()?),
            "fill" => Self::Fill(word()?.parse()?),
            "drain-all" => Self::DrainAll(word()?.parse()?),
            _ => bail!("`{text}` is no step"),
        })
    }
}

impl Script {
    /// Follows the steps to the end, whatever they meet, and closes. One line of what was seen for each.
    pub fn follow(&self, mut stream: TcpStream, greeting: &str) -> Vec<String> {
        if let Err(error) = stream.set_read_timeout(Some(PATIENCE)) {
            return vec![errno(&error)];
        }
        let seen =
            self.0.iter().map(|step| step.run(&mut stream, greeting).unwrap_or_else(|error| errno(&error)));
        seen.collect()
    }
}

impl Step {
    fn run(&self, stream: &mut TcpStream, greeting: &str) -> io::Result<String> {
        match self {
            Self::Say(text) => stream.write_all(text.as_bytes()).map(|()| "said".to_owned()),
            Self::Greet => stream.write_all(format!("{greeting}\n").as_bytes()).map(|()| "said".to_owned()),
            Self::TellCongestion => tell_congestion(stream),
            Self::Urgent(text) => {
                SockRef::from(&*stream).send_out_of_band(text.as_bytes()).map(|_| "said".to_owned())
            }
            Self::Hear(count) => hear(stream, *count),
            Self::HearLine => hear_line(stream),
            Self::HearEnd => Ok(hear_end(stream)),
            Self::Echo => echo(stream),
            Self::Shut => stream.shutdown(Shutdown::Write).map(|()| "shut".to_owned()),
            Self::Reset => reset(stream),
            Self::Broken => broken(stream),
            Self::Pause(time) => {
                std::thread::sleep(*time);
                Ok("paused".to_owned())
            }
            Self::Gate(path) => wait_for_file(path),
            Self::Mark(path) => fs::write(path, "").map(|()| "marked".to_owned()),
            Self::Pour(count, seed) => pour(stream, *count, *seed),
            Self::Drain(count, seed) => drain(stream, *count, *seed),
            Self::Exchange(count, own, theirs) => exchange(stream, *count, *own, *theirs),
            Self::Stuff(seed) => stuff(stream, *seed),
            Self::Fill(seed) => stuff(stream, *seed).map(|_| "filled".to_owned()),
            Self::DrainAll(seed) => drain_all(stream, *seed),
        }
    }
}

fn tell_congestion(stream: &mut TcpStream) -> io::Result<String> {
    let name = SockRef::from(&*stream).tcp_congestion()?;
    let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
    stream.write_all(format!("{name}\n").as_bytes())?;
    Ok(name)
}

fn hear(stream: &mut TcpStream, count: usize) -> io::Result<String> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn hear_line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    // One at a time, so that nothing of what follows the line is taken.
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

fn hear_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let ended = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    format!("{text}|{}", ended.map_or_else(|error| errno(&error), |_| "end".to_owned()))
}

/// For as long as the other side wants.
fn echo(stream: &mut TcpStream) -> io::Result<String> {
    stream.set_read_timeout(None)?;
    io::copy(&mut stream.try_clone()?, stream).map(|count| format!("echoed {count}"))
}

/// The RST leaves when the socket is closed, and the script's end does that; here the stream is replaced by a
/// socket that is not connected.
fn reset(stream: &mut TcpStream) -> io::Result<String> {
    SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
    let spare = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    *stream = spare.into();
    Ok("reset".to_owned())
}

fn broken(stream: &TcpStream) -> io::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // With no event asked for, only errors and hang-ups are reported.
        let mut polled = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        if poll(&mut polled, timeout)? == 0 {
            return Ok("still whole".to_owned());
        }
        if let Some(error) = stream.take_error()? {
            return Ok(errno(&error));
        }
        if polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)) {
            return Ok("hung up".to_owned());
        }
    }
}

fn wait_for_file(path: &PathBuf) -> io::Result<String> {
    let deadline = Instant::now() + 3 * PATIENCE;
    while !fs::exists(path)? {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok("opened".to_owned())
}

fn pour(stream: &mut TcpStream, count: u64, seed: u64) -> io::Result<String> {
    let mut at = 0;
    while at < count {
        let chunk = pattern(at, (count - at).min(CHUNK as u64) as usize, seed);
        stream.write_all(&chunk)?;
        at += chunk.len() as u64;
    }
    Ok(format!("poured {at}"))
}

fn drain(stream: &mut TcpStream, count: u64, seed: u64) -> io::Result<String> {
    let mut at = 0;
    while at < count {
        let mut chunk = vec![0; (count - at).min(CHUNK as u64) as usize];
        stream.read_exact(&mut chunk)?;
        if chunk != pattern(at, chunk.len(), seed) {
            return Ok(format!("wrong bytes after {at}"));
        }
        at += chunk.len() as u64;
    }
    Ok(format!("drained {at}"))
}

fn drain_all(stream: &mut TcpStream, seed: u64) -> io::Result<String> {
    let mut at = 0;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        stream.take(CHUNK as u64).read_to_end(&mut chunk)?;
        if chunk != pattern(at, chunk.len(), seed) {
            return Ok(format!("wrong bytes after {at}"));
        }
        if chunk.is_empty() {
            return Ok(at.to_string());
        }
        at += chunk.len() as u64;
    }
}

fn exchange(stream: &mut TcpStream, count: u64, own: u64, theirs: u64) -> io::Result<String> {
    let mut other = stream.try_clone()?;
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || pour(&mut other, count, own));
        let drained = drain(stream, count, theirs)?;
        let poured = sender.join().map_err(|_| io::Error::other("the sender panicked"))??;
        Ok(format!("{poured}, {drained}"))
    })
}

fn stuff(stream: &mut TcpStream, seed: u64) -> io::Result<String> {
    stream.set_nonblocking(true)?;
    let mut at = 0;
    loop {
        match stream.write(&pattern(at, CHUNK, seed)) {
            Ok(count) => at += count as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let timeout = PollTimeout::try_from(FULL_AFTER).unwrap_or(PollTimeout::MAX);
                if poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)], timeout)? == 0 {
                    stream.set_nonblocking(false)?;
                    return Ok(at.to_string());
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Bytes that tell their place and their stream: lost, doubled, swapped or misdirected ones show.
fn pattern(at: u64, length: usize, seed: u64) -> Vec<u8> {
    let (first, skip) = (at / 8, (at % 8) as usize);
    let mut bytes = vec![0; (length + skip).next_multiple_of(8)];
    let key = seed.wrapping_mul(0xff51_afd7_ed55_8ccd);
    for (place, word) in (first..).zip(bytes.as_chunks_mut().0) {
        *word = (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key).to_le_bytes();
    }
    bytes.drain(..skip);
    bytes.truncate(length);
    bytes
}
