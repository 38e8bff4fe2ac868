//! Tables, runs and tiles: what every cached thing is a row of.
//!
//! A kv head's table has a key and a value column. Its rows lie in runs; the rows of one run share one code per column and
//! move only towards colder runs. A tile is 32 rows of one run: codes and their parameters, nothing else. Everything that is
//! one number per row (position, bias, score columns) lies beside the tiles, absent where unused. Numbers per row that live
//! in backend memory are stored tile by tile in the order [`pi`](crate::tile::pi).

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Buf, Codes, ColId, Point, TILE_ROWS};

/// What a table belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Home {
    /// One kv head: layer, head.
    Head(u16, u16),
    /// Several layers jointly.
    Layers(Range<u16>),
    /// A feature slot.
    Point(Point),
    /// A memory bank.
    Bank(u32),
}

/// How long a table lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Life {
    /// Until the pass ends.
    Pass,
    /// Until its group of steps ends.
    Group,
    /// As long as the session.
    Sequence,
    /// For ever, named by content.
    Frozen,
}

/// Index of a run in its table. Run 0 is the open, dense run that rows arrive in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunId(pub u8);

impl RunId {
    /// The dense run that rows arrive in.
    pub const OPEN: Self = Self(0);
}

/// 32 rows of one run. A full tile is sealed: it is never written again while anybody else may read it.
#[derive(Clone, Debug)]
pub struct Tile {
    /// Key part and value part, see [`tile_bytes`](crate::tile_bytes).
    pub codes: Buf,
    /// This table alone holds the tile and may write into it; otherwise it is copied before a write.
    pub own: bool,
}

/// Positions of the rows of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pos {
    /// Consecutive from here.
    From(u32),
    /// One by one, in row order.
    List(Arc<Vec<u32>>),
}

impl Pos {
    /// Position of row `i`.
    #[inline]
    pub fn at(&self, i: usize) -> u32 {
        match self {
            Self::From(p) => p + i as u32,
            Self::List(l) => l[i],
        }
    }

    /// Appends the position of a new row behind the `rows` present ones; stays `From` while it can.
    pub fn push(&mut self, rows: usize, pos: u32) {
        match self {
            Self::From(p) if rows == 0 => *p = pos,
            Self::From(p) if *p + rows as u32 == pos => {}
            Self::From(p) => {
                let mut list: Vec<u32> = (0..rows as u32).map(|i| *p + i).collect();
                list.push(pos);
                *self = Self::List(Arc::new(list));
            }
            Self::List(l) => Arc::make_mut(l).push(pos),
        }
    }

    /// All of the first `rows` positions.
    pub fn to_vec(&self, rows: usize) -> Vec<u32> {
        (0..rows).map(|i| self.at(i)).collect()
    }

    /// The shortest form of a list.
    pub fn from_list(list: Vec<u32>) -> Self {
        match list.first() {
            None => Self::From(0),
            Some(&p) if list.iter().enumerate().all(|(i, &x)| x == p + i as u32) => Self::From(p),
            Some(_) => Self::List(Arc::new(list)),
        }
    }
}

/// What lies beside the tiles of a run, one number per row.
#[derive(Clone, Debug)]
pub struct Meta {
    /// Positions.
    pub pos: Pos,
    /// `[tiles, 32]` f32 added to scores, in log2 units; [`HIDDEN`] hides a row.
    pub bias: Option<Buf>,
    /// `[tiles, 32]` f32 factors of the key and value rows.
    pub scale: [Option<Buf>; 2],
    /// `[tiles, 32]` f32 score columns, moved with the rows.
    pub cols: Vec<(ColId, Buf)>,
}

/// Bias of a row that no query may see.
pub const HIDDEN: f32 = -1e30;

/// Rows of one table under one pair of codes.
#[derive(Clone, Debug)]
pub struct Run {
    /// Codes of keys and values.
    pub codes: Codes,
    /// `ceil(rows / 32)` tiles.
    pub tiles: Arc<Vec<Tile>>,
    /// Rows present; the last tile may be partly filled.
    pub rows: u32,
    /// What lies beside the tiles.
    pub meta: Meta,
}

impl Run {
    /// An empty run.
    pub fn new(codes: Codes) -> Self {
        let meta = Meta { pos: Pos::From(0), bias: None, scale: [None, None], cols: Vec::new() };
        Self { codes, tiles: Arc::new(Vec::new()), rows: 0, meta }
    }

    /// Rows of tile `i` that are present.
    pub fn rows_of_tile(&self, i: usize) -> usize {
        (self.rows as usize).saturating_sub(i * TILE_ROWS).min(TILE_ROWS)
    }
}

/// An ordered list of runs of one home.
#[derive(Clone, Debug)]
pub struct Table {
    /// What it belongs to.
    pub home: Home,
    /// Runs, hottest first.
    pub runs: Vec<Run>,
    /// How long it lives.
    pub life: Life,
}

impl Table {
    /// Rows of all runs, hidden ones included.
    pub fn rows(&self) -> u32 {
        self.runs.iter().map(|r| r.rows).sum()
    }
}
