//! A small blocking client with one connection, as the Nix of a host.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Large enough that the client's system calls are not what is measured.
const BUFFER: usize = 512 * 1024;

/// One connection, kept for many requests.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) length: usize,
    /// What of the body came with the head: where it lies in the buffer.
    begun: std::ops::Range<usize>,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { stream, buffer: vec![0; BUFFER] })
    }

    /// Asks, and reads the head.
    pub(crate) fn ask(&mut self, path: &str) -> io::Result<Answer> {
        self.stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n").as_bytes())?;
        let mut filled = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[filled..])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += read;
            let Some(end) = self.buffer[..filled].windows(4).position(|end| end == b"\r\n\r\n") else {
                continue;
            };
            let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            let (Some(status), Some(length)) = (status, length) else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, head));
            };
            return Ok(Answer { status, length, begun: end + 4..filled });
        }
    }

    /// Reads the body and keeps it.
    pub(crate) fn text(&mut self, answer: &Answer) -> io::Result<String> {
        let mut text = self.buffer[answer.begun.clone()].to_vec();
        let begun = text.len();
        text.resize(answer.length, 0);
        self.stream.read_exact(&mut text[begun..])?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Reads the body and throws it away.
    pub(crate) fn discard(&mut self, answer: &Answer) -> io::Result<()> {
        let mut rest = answer.length - answer.begun.len();
        while rest > 0 {
            match self.stream.read(&mut self.buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => rest -= read,
            }
        }
        Ok(())
    }
}
