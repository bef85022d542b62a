//! The database and its client: a protocol of lines in which the server speaks first.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::http::PATIENCE;
use crate::server;

const GREETING: &str = "shop-db ready\n";

/// Longest line that either side takes.
const MOST_BYTES: u64 = 1024;

/// What the database says of a fruit.
pub struct Answer {
    pub stock: u64,
    /// The client's address as the database saw it.
    pub db_saw: String,
}

/// Greets, then answers line by line until `QUIT` or the end.
pub fn serve(mut stream: TcpStream) -> Result<()> {
    let peer = server::peer(&stream)?;
    stream.write_all(GREETING.as_bytes())?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(line) = read_line(&mut reader)? {
        println!("{peer} {line}");
        match line.split_once(' ') {
            Some(("STOCK", fruit)) => writeln!(stream, "OK {} {peer}", stock(fruit))?,
            None if line == "QUIT" => break,
            _ => stream.write_all(b"ERR STOCK <fruit> or QUIT\n")?,
        }
    }
    Ok(())
}

/// Asks the database for the stock of one fruit, on a connection of its own.
pub fn ask(db: SocketAddr, fruit: &str) -> Result<Answer> {
    let mut session = Session::open(db)?;
    let answer = session.stock(fruit)?;
    session.stream.write_all(b"QUIT\n")?;
    Ok(answer)
}

/// Keeps one session and asks every second, until the database is gone.
pub fn watch(db: SocketAddr) -> Result<()> {
    let mut session = Session::open(db)?;
    loop {
        println!("apples: {}", session.stock("apples")?.stock);
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// A client's connection, greeted.
struct Session {
    db: SocketAddr,
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Session {
    fn open(db: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&db, PATIENCE);
        let stream = stream.with_context(|| format!("{db} does not take connections"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let greeting = read_line(&mut reader).with_context(|| format!("{db} does not greet"))?;
        ensure!(greeting.as_deref() == Some(GREETING.trim_end()), "{db} greets with {greeting:?}");
        Ok(Self { db, stream, reader })
    }

    fn stock(&mut self, fruit: &str) -> Result<Answer> {
        let db = self.db;
        self.stream.write_all(format!("STOCK {fruit}\n").as_bytes())?;
        let answer = read_line(&mut self.reader)?.with_context(|| format!("{db} closed the connection"))?;
        let words: Vec<&str> = answer.split(' ').collect();
        match words[..] {
            ["OK", stock, peer] => Ok(Answer { stock: stock.parse()?, db_saw: peer.to_owned() }),
            _ => bail!("{db} answers {answer:?}"),
        }
    }
}

fn read_line(reader: &mut BufReader<TcpStream>) -> Result<Option<String>> {
    let mut line = String::new();
    reader.take(MOST_BYTES).read_line(&mut line)?;
    Ok((!line.is_empty()).then(|| line.trim_end().to_owned()))
}

/// Every fruit has a stock, always the same.
fn stock(fruit: &str) -> u64 {
    fruit.bytes().fold(7, |sum, byte| (sum * 31 + u64::from(byte)) % 100)
}
