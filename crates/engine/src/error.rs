//! Errors of the engine; `code()` is what TypeScript sees.

use kvasir_core as core;

/// Result of engine calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// From the vocabulary, a backend or the model.
    #[error(transparent)]
    Core(#[from] core::Error),
    /// From the store.
    #[error(transparent)]
    Store(#[from] kvasir_store::Error),
    /// The session has a pass in flight; it has one writer.
    #[error("session is busy: {what}")]
    Busy {
        /// What is in flight.
        what: String,
    },
    /// The session or store was closed.
    #[error("{what} is closed")]
    Closed {
        /// What was closed.
        what: &'static str,
    },
    /// Nothing is stored under this id for this tenant.
    #[error("no session {id:?} for this tenant")]
    NoSession {
        /// The id asked for.
        id: String,
    },
    /// The stored session cannot be used with what the caller brought.
    #[error("session {id:?}: {field} differs: stored {stored}, given {given}")]
    Mismatch {
        /// The id asked for.
        id: String,
        /// What differs.
        field: &'static str,
        /// As stored.
        stored: String,
        /// As given.
        given: String,
    },
    /// More tokens than the model was made for.
    #[error("context: expected at most {limit} tokens, got {got}")]
    ContextOverflow {
        /// The model's context.
        limit: u32,
        /// Tokens the session would hold.
        got: u64,
    },
}

impl Error {
    /// Stable name of the kind of error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Core(e) => e.code(),
            Self::Store(e) => e.code(),
            Self::Busy { .. } => "Busy",
            Self::Closed { .. } => "Closed",
            Self::NoSession { .. } => "NoSession",
            Self::Mismatch { .. } => "Mismatch",
            Self::ContextOverflow { .. } => "ContextOverflow",
        }
    }
}
