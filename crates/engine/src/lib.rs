//! The engine: sessions, passes, plans, commit and resume.
//!
//! A [`Session`] holds the tables of one sequence. The model runs through [`Passes`], which are its [`Hooks`]; between
//! passes policies plan and [`Session`] applies. [`Cache`] opens, commits and resumes sessions over a store.
//!
//! [`Hooks`]: kvasir_core::Hooks

#![forbid(unsafe_code)]

mod apply;
mod blocks;
mod cache;
mod cancel;
mod commit;
pub mod drive;
mod error;
mod floor;
mod foreign;
mod pass;
mod pick;
mod recipe;
mod report;
mod resume;
mod session;
mod undo;

pub use blocks::{BlockTiles, SharedPrefix};
pub use cache::{Cache, PrefillReport};
pub use cancel::Cancel;
pub use commit::CommitReport;
pub use error::{Error, Result};
pub use foreign::Order;
pub use kvasir_policies::methods_json;
pub use pass::{Pass, Passes, select};
pub use recipe::Recipe;
pub use report::SessionReport;
pub use resume::ResumeReport;
pub use session::{Dtype, PlanStats, Session, SessionOptions};
