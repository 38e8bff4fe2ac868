//! The error type of `core`, and of every trait defined here.
//!
//! Variants carry numbers; `code()` is stable and is what TypeScript sees as `CacheError.code`.

use std::fmt::Display;

/// Result of every call through the traits of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the field, what was expected and what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value the caller passed is out of range, of the wrong length or of the wrong kind.
    #[error("{field}: expected {expected}, got {got}")]
    Invalid {
        /// Dotted path of the offending field.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The request is well formed, but this build, model or code cannot do it.
    #[error("unsupported: {what}")]
    Unsupported {
        /// The feature, named as the user wrote it.
        what: String,
    },
    /// NaN or infinity where numbers are needed.
    #[error("{what}: row {row} holds a value that is not finite")]
    NonFinite {
        /// The tensor.
        what: String,
        /// First offending row.
        row: usize,
    },
    /// A file or a message does not follow its format.
    #[error("{what}: malformed: {reason}")]
    Malformed {
        /// The file or structure.
        what: String,
        /// The rule that was broken.
        reason: String,
    },
    /// Memory could not be had.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// How much was asked for.
        bytes: u64,
    },
    /// The work was cancelled by its caller; nothing of it remains.
    #[error("cancelled")]
    Cancelled,
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl Error {
    /// `field: expected …, got …`.
    pub fn invalid(field: impl Into<String>, expected: impl Display, got: impl Display) -> Self {
        Self::Invalid { field: field.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// A feature that is not there.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }

    /// A broken format rule.
    pub fn malformed(what: impl Into<String>, reason: impl Display) -> Self {
        Self::Malformed { what: what.into(), reason: reason.to_string() }
    }

    /// An I/O failure at `path`.
    pub fn io(path: impl AsRef<std::path::Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().display().to_string(), source }
    }

    /// Stable name of the kind of error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "InvalidArgument",
            Self::Unsupported { .. } => "Unsupported",
            Self::NonFinite { .. } => "NonFinite",
            Self::Malformed { .. } => "Malformed",
            Self::OutOfMemory { .. } => "OutOfMemory",
            Self::Cancelled => "Cancelled",
            Self::Io { .. } => "Io",
        }
    }
}
