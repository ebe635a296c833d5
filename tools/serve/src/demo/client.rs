//! A minimal HTTP/1.1 client for a server on this machine: one request a connection, JSON in, JSON
//! or server-sent events out.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;

use serde_json::Value;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// Sends a request and reads the whole answer.
///
/// # Errors
/// Those of the connection; `InvalidData` where the answer is not HTTP.
pub fn send(server: SocketAddr, method: &str, path: &str, body: &str) -> io::Result<Answer> {
    let (status, mut reader) = open(server, method, path, body)?;
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    Ok(Answer { status, body: text })
}

/// Sends a request for server-sent events and hands over the data of each as it comes. `Break`
/// closes the connection.
///
/// # Errors
/// As [`send`]; an answer other than 200 is an error with its body.
pub fn stream<B>(
    server: SocketAddr,
    path: &str,
    body: &Value,
    mut each: impl FnMut(&str) -> ControlFlow<B>,
) -> io::Result<Option<B>> {
    let (status, mut reader) = open(server, "POST", path, &body.to_string())?;
    if status != 200 {
        let mut text = String::new();
        reader.read_to_string(&mut text)?;
        return Err(io::Error::other(format!("status {status}: {text}")));
    }
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        if let Some(data) = line.trim_end().strip_prefix("data: ")
            && let ControlFlow::Break(value) = each(data)
        {
            return Ok(Some(value));
        }
        line.clear();
    }
    Ok(None)
}

fn open(
    server: SocketAddr,
    method: &str,
    path: &str,
    body: &str,
) -> io::Result<(u16, Box<dyn BufRead>)> {
    let mut connection = TcpStream::connect(server)?;
    connection.set_nodelay(true)?;
    let length = body.len();
    write!(
        connection,
        "{method} {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    let mut reader = BufReader::new(connection);
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP");
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(wrong)?;
    let (mut chunked, mut length) = (false, None);
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let header = line.trim_end().to_ascii_lowercase();
        match header.split_once(": ") {
            Some(("transfer-encoding", "chunked")) => chunked = true,
            Some(("content-length", bytes)) => length = bytes.parse().ok(),
            Some(_) => {}
            None => break,
        }
    }
    let reader: Box<dyn BufRead> = if chunked {
        Box::new(BufReader::new(Chunked { reader, left: 0 }))
    } else {
        Box::new(reader.take(length.unwrap_or(u64::MAX)))
    };
    Ok((status, reader))
}

/// A body in chunks, joined.
struct Chunked<R> {
    reader: R,
    left: usize,
}

impl<R: BufRead> Read for Chunked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            self.left = usize::from_str_radix(line.trim_end(), 16)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let most = buffer.len().min(self.left);
        let read = self.reader.read(&mut buffer[..most])?;
        self.left -= read;
        if self.left == 0 {
            self.reader.read_line(&mut String::new())?;
        }
        Ok(read)
    }
}
