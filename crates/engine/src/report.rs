//! What a session holds and what its policies did.

use kvasir_store::{BLOCK_TOKENS, Lineage};
use serde::Serialize;

use crate::session::Session;

/// State of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionReport {
    /// Positions computed so far, evicted ones included.
    pub tokens: u32,
    /// Bytes of tiles, columns and biases.
    pub bytes_held: u64,
    /// The same per position, 0 for an empty session.
    pub bytes_per_token: f64,
    /// Tiles in dense runs.
    pub dense_tiles: u64,
    /// Tiles in runs whose format is lossy.
    pub coded_tiles: u64,
    /// `exact`, or the digest of recipe and engine, hex: how the next rows come to be.
    pub lineage: String,
    /// Why no block of this session is shared, if so.
    pub private: Option<String>,
    /// Plans that held at least one op.
    pub plans: u64,
    /// Ops refused by their floor.
    pub refused: u64,
}

impl Session {
    /// State of the session.
    pub fn report(&self) -> SessionReport {
        let tiles = self.tables().iter().flatten().flat_map(|t| &t.runs).map(|r| r.tiles.len() as u64);
        let (tokens, bytes_held, coded_tiles) = (self.len(), self.bytes_held(), self.coded_tiles());
        let lineage = if self.exact_to == self.seen && self.private.is_none() {
            Lineage::Exact
        } else {
            self.lineage_of(self.seen as usize / BLOCK_TOKENS)
        };
        SessionReport {
            tokens,
            bytes_held,
            bytes_per_token: bytes_held as f64 / f64::from(tokens.max(1)),
            dense_tiles: tiles.sum::<u64>() - coded_tiles,
            coded_tiles,
            lineage: match lineage {
                Lineage::Exact => "exact".to_owned(),
                Lineage::Derived(hash) => hex(&hash),
            },
            private: self.private.map(str::to_owned),
            plans: self.stats().plans,
            refused: self.stats().refused,
        }
    }
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |text, b| text + &format!("{b:02x}"))
}
