use std::{error, fmt, io};

/// A result with stemkv's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an [`Error`]: one kind for each different answer.
///
/// A miss is not an error, and neither is a declined save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The call or the configuration is wrong: fix it, it will not go through as it is.
    Invalid,
    /// A bound is reached: compute on, or try later.
    Busy,
    /// Something outside is missing or fails (device, disk, permission): go on without it.
    Unavailable,
    /// Bytes did not verify and were dropped: compute them anew.
    Corrupt,
    /// The store is closed.
    Closed,
    /// A fault of ours: go on without the cache, and please report it.
    Internal,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::Invalid => "invalid",
            ErrorKind::Busy => "busy",
            ErrorKind::Unavailable => "unavailable",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::Closed => "closed",
            ErrorKind::Internal => "internal",
        })
    }
}

/// What went wrong: a kind to act on, a sentence to read, `key=value` context and the cause.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    context: Vec<(&'static str, String)>,
    source: Option<Box<dyn error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`. The message is lower case, without a trailing dot, and says what to do
    /// where something can be done.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error(Box::new(Inner {
            kind,
            message: message.into(),
            context: Vec::new(),
            source: None,
        }))
    }

    /// [`ErrorKind::Invalid`] with a message.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// [`ErrorKind::Busy`] with a message.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Busy, message)
    }

    /// [`ErrorKind::Unavailable`] with a message.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    /// [`ErrorKind::Corrupt`] with a message.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// [`ErrorKind::Closed`].
    pub fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the store is closed")
    }

    /// [`ErrorKind::Internal`] with a message.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Adds one `key=value` that is printed after the message.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((key, value.to_string()));
        self
    }

    /// Adds the cause. Its text is printed by whoever walks the chain, not by us.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Did the medium fail to give the bytes (`EIO`: a bad sector), rather than the system to let them be
    /// read?
    pub fn is_unreadable(&self) -> bool {
        let mut cause = error::Error::source(self);
        while let Some(source) = cause {
            let system = source.downcast_ref::<io::Error>();
            if system.and_then(io::Error::raw_os_error) == Some(libc::EIO) {
                return true;
            }
            cause = source.source();
        }
        false
    }

    /// Did sound bytes turn out to be of another identity, geometry or version than they were asked for
    /// by (`Corrupt`, caused by an `Invalid`)? They are not damaged: what led to them is wrong.
    pub fn is_mismatch(&self) -> bool {
        let cause = error::Error::source(self).and_then(|cause| cause.downcast_ref::<Error>());
        self.kind() == ErrorKind::Corrupt
            && cause.is_some_and(|cause| cause.kind() == ErrorKind::Invalid)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.kind, self.0.message)?;
        for (i, (key, value)) in self.0.context.iter().enumerate() {
            write!(f, "{} {key}={value}", if i == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut source = error::Error::source(self);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_medium_that_fails_is_told_from_a_system_that_refuses() {
        let read = |code| {
            let cause = Error::unavailable("pread").caused_by(io::Error::from_raw_os_error(code));
            Error::unavailable("cannot read a record").caused_by(cause)
        };
        assert!(read(libc::EIO).is_unreadable());
        assert!(!read(libc::EMFILE).is_unreadable());
        assert!(!Error::unavailable("cannot read a record").is_unreadable());
    }

    #[test]
    fn display_shows_kind_message_and_context_and_debug_adds_the_causes() {
        let error = Error::unavailable("cannot read the store")
            .with("path", "/kv")
            .with("errno", 5)
            .caused_by(std::io::Error::other("gone"));
        assert_eq!(
            error.to_string(),
            "unavailable: cannot read the store: path=/kv, errno=5"
        );
        assert_eq!(format!("{error:?}"), format!("{error}: gone"));
    }
}
