//! The vocabulary of kvasir: everything that policies, backends, models, the store and the engine say to each other.
//!
//! A cached thing is a row of a [`Table`]; a table is a list of [`Run`]s; the rows of a run share one [`Code`] per column.
//! A [`KvPolicy`] emits a [`Plan`] of symbolic [`Op`]s and [`Want`]s. A [`Backend`] runs [`Call`]s. A [`Model`] meets the
//! cache through [`Hooks`].

#![forbid(unsafe_code)]

mod backend;
mod buf;
mod call;
pub mod check;
mod code;
mod error;
pub mod eval;
mod layout;
mod model;
mod plan;
mod policy;
mod table;
pub mod tile;

pub use backend::{Backend, BackendInfo};
pub use buf::Buf;
pub use call::{Activation, Attend, AttendSeq, Call, ColumnUpdate, RopeArg, RowWrite, Weight, WeightType};
pub use code::{Axis, Code, Codes, Format, KeySpace, Map, TILE_ROWS, tile_bytes, value_offset};
pub use error::{Error, Result};
pub use layout::{LayerLayout, Layout, Part, Point, Rope, SideId};
pub use model::{Ask, Batch, Go, Hooks, Logits, Model, Rows};
pub use plan::{
    At, Budget, ColId, Fit, Groups, Heads, Op, Over, Per, Pick, Plan, Probe, Queries, Reduce, Role, Source,
    UnitKind, Want, Weights,
};
pub use policy::{KvPolicy, KvSpec, Mask, Positions, ReadColumn, Trigger, View, Wake};
pub use table::{HIDDEN, Home, Life, Meta, Pos, Run, RunId, Table, Tile};
