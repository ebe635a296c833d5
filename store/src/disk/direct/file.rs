//! A file that is read past the page cache where its file system allows that.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::OnceLock;

/// An open file.
pub(in crate::disk) struct DirectFile {
    file: File,
    is_direct: bool,
    /// Dropped after the file was closed.
    attached: OnceLock<Box<dyn Send + Sync>>,
}

impl DirectFile {
    /// Opens `path` for reading, with O_DIRECT where `direct` asks for it and the file system takes
    /// it.
    pub(in crate::disk) fn open(path: &Path, direct: bool) -> io::Result<DirectFile> {
        if direct {
            let opened = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(path);
            match opened {
                // The file system does not know the flag.
                Err(error) if is_refusal(&error) => {}
                opened => {
                    return opened.map(|file| DirectFile {
                        file,
                        is_direct: true,
                        attached: OnceLock::new(),
                    });
                }
            }
        }
        Ok(DirectFile {
            file: File::open(path)?,
            is_direct: false,
            attached: OnceLock::new(),
        })
    }

    /// Drops `what` once the file is closed.
    pub(in crate::disk) fn attach(&self, what: impl Send + Sync + 'static) {
        let _ = self.attached.set(Box::new(what));
    }

    /// Is it read past the page cache?
    pub(in crate::disk) fn is_direct(&self) -> bool {
        self.is_direct
    }
}

/// Does a file system, or an alignment that it wants, refuse O_DIRECT by this?
pub(in crate::disk) fn is_refusal(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

impl AsRawFd for DirectFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
