//! What can go wrong on the way in ([`Error`]) and why a read gave nothing ([`Miss`]).
//!
//! Writing fails with an error; reading never does: whatever is wrong with the bytes on disk, the reader gets a typed
//! miss, the engine computes the rows again, and the reason is counted.

use std::fmt::Display;
use std::io;
use std::path::Path;

/// Result of everything that writes.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value of the caller is out of range, of the wrong length or of the wrong kind.
    #[error("{field}: expected {expected}, got {got}")]
    Invalid {
        /// The offending field.
        field: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// No room: the file system or the byte limit is full and nothing may be evicted. Nothing was written.
    #[error("store is full: {wanted_bytes} bytes wanted, {free_bytes} bytes can be had in {path}")]
    StoreFull {
        /// What had to be written.
        wanted_bytes: u64,
        /// What was left, as far as it is known (0 when the file system said no).
        free_bytes: u64,
        /// The store's folder.
        path: String,
    },
    /// Reading or writing a file failed. Nothing of the operation remains.
    #[error("{op} {path}: {source}")]
    Io {
        /// The operation, as named in [`Fs`](crate::Fs).
        op: &'static str,
        /// The file or folder.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The secret file is not 32 bytes.
    #[error("{path}: malformed: {reason}")]
    Malformed {
        /// The file.
        path: String,
        /// The rule that was broken.
        reason: String,
    },
    /// The operating system gave no random bytes.
    #[error("no random bytes: {0}")]
    Random(String),
}

impl Error {
    pub(crate) fn invalid(field: &'static str, expected: impl Display, got: impl Display) -> Self {
        Self::Invalid { field, expected: expected.to_string(), got: got.to_string() }
    }

    /// `source`, told apart: a full disk is not a broken one.
    pub(crate) fn io(op: &'static str, path: &Path, wanted_bytes: u64, source: io::Error) -> Self {
        let shown = path.display().to_string();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::StoreFull { wanted_bytes, free_bytes: 0, path: shown }
            }
            _ => Self::Io { op, path: shown, source },
        }
    }

    /// Stable name of the kind of error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "InvalidArgument",
            Self::StoreFull { .. } => "StoreFull",
            Self::Io { .. } | Self::Random(_) => "Io",
            Self::Malformed { .. } => "Malformed",
        }
    }
}

/// Why a read gave no data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Miss {
    /// Nothing of this name is stored.
    #[error("not found")]
    NotFound,
    /// The file ends before the thing does.
    #[error("truncated: expected {expected} bytes, got {got}")]
    Truncated {
        /// Bytes the format asks for.
        expected: u64,
        /// Bytes there are.
        got: u64,
    },
    /// The checksum over a region does not fit its bytes.
    #[error("checksum of {region} does not match")]
    Checksum {
        /// The region, as named in `docs/format.md`.
        region: &'static str,
    },
    /// Written by a version this build does not know.
    #[error("version {got} is not known")]
    Version {
        /// The version found.
        got: u32,
    },
    /// The bytes break a rule of the format.
    #[error("malformed {field}")]
    Malformed {
        /// The field that broke it.
        field: &'static str,
    },
    /// Sound, but not what was asked for: another tenant, model, layout, lineage, type or text.
    #[error("{field} is of another origin")]
    Foreign {
        /// The first field that differs.
        field: &'static str,
    },
    /// Only a lossy copy of the rows is stored and the reader asked for exact ones.
    #[error("only a lossy copy (codec {codec:016x}) is stored")]
    LossyCopy {
        /// The codec of the copy.
        codec: u64,
    },
    /// The operating system failed to read.
    #[error("{op}: {kind}")]
    Io {
        /// The operation.
        op: &'static str,
        /// The kind of failure.
        kind: io::ErrorKind,
    },
}

impl Miss {
    /// Stable word for reports and counters.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound => "not-found",
            Self::Truncated { .. } => "truncated",
            Self::Checksum { .. } => "checksum",
            Self::Version { .. } => "version",
            Self::Malformed { .. } => "malformed",
            Self::Foreign { .. } => "foreign",
            Self::LossyCopy { .. } => "lossy-copy",
            Self::Io { .. } => "io",
        }
    }

    /// True where bytes are damaged or unreadable, as opposed to absent or somebody else's.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Truncated { .. } | Self::Checksum { .. } | Self::Malformed { .. } | Self::Io { .. }
        )
    }

    pub(crate) fn io(op: &'static str, e: &io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            kind => Self::Io { op, kind },
        }
    }
}
