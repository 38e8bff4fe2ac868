//! Commit: a session's blocks and its state become durable, or nothing does.
//!
//! Full blocks are named by the chain of their ids and lineage; those that are stored already are not read, let alone
//! written. What is left (the open tile, coded tiles that do not fill a block, sinks, columns, everything of a session whose
//! rows are private) goes into one private snapshot. Then the record, then the answer.

use std::sync::Arc;
use std::time::Instant;

use kvasir_core::{Buf, Error as CoreError, Format, KeySpace, Pos, Want};
use kvasir_store::{
    BLOCK_TOKENS, BlockKey, Chain, CodecId, Copies, Draft, Identity, Record, Store, TenantKey,
};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::blocks::{BlockTiles, SharedPrefix, code_tags};
use crate::session::{PlanStats, Session};
use crate::{Error, Result};

/// Whose session it is, where it is kept, and the names of its blocks.
#[derive(Clone)]
pub(crate) struct Owner {
    pub(crate) store: Arc<Store<Arc<BlockTiles>>>,
    pub(crate) key: TenantKey,
    pub(crate) share: Option<SharedPrefix>,
    pub(crate) chain: Chain,
}

/// What a commit did.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CommitReport {
    /// Positions of the session.
    pub tokens: u32,
    /// Blocks written by this commit.
    pub new_blocks: u64,
    /// Blocks that were stored already.
    pub reused_blocks: u64,
    /// Bytes of all files written.
    pub new_bytes: u64,
    /// Bytes of the private snapshot among them, before padding.
    pub snapshot_bytes: u64,
    /// Why no block of this session is shared, if so.
    pub private: Option<String>,
    /// It survives the process and a power cut.
    pub durable: bool,
    /// Wall time.
    pub ms: f64,
}

/// The engine's part of a record.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct State {
    pub(crate) dtype: crate::Dtype,
    pub(crate) keys: KeySpace,
    pub(crate) recipe: Json,
    pub(crate) seen: u32,
    pub(crate) exact_to: u32,
    pub(crate) private: Option<String>,
    pub(crate) policies: Json,
    pub(crate) wants: Vec<Want>,
    pub(crate) stats: PlanStats,
    pub(crate) shared_tokens: u32,
    /// The caller's own state: the sampler, say.
    pub(crate) extra: Json,
}

/// One run in a snapshot.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RunState {
    pub(crate) tags: [u8; 2],
    pub(crate) rows: u32,
    /// First position, where they are consecutive.
    pub(crate) from: Option<u32>,
    /// Positions one by one, elsewhere.
    pub(crate) list: Vec<u32>,
    /// Tiles whose bytes are in the snapshot; the others are in blocks.
    pub(crate) inline: Vec<u32>,
    /// Columns present.
    pub(crate) cols: Vec<u16>,
    pub(crate) bias: bool,
}

impl Session {
    /// Names every block that has none yet and can have one; returns how many blocks the chain has.
    pub(crate) fn name_blocks(&mut self) -> Result<usize> {
        let Some(mut owner) = self.owner.take() else { return Ok(0) };
        let full = self.ids.len().min(self.seen as usize) / BLOCK_TOKENS;
        if self.private.is_none() {
            for b in owner.chain.len()..full {
                let shared =
                    owner.share.as_ref().is_some_and(|s| (b + 1) * BLOCK_TOKENS <= s.tokens as usize);
                match &owner.share {
                    Some(s) if shared => owner.chain.set_key(&s.key),
                    _ => owner.chain.set_key(&owner.key),
                }
                owner.chain.push(self.lineage_of(b), &self.ids[b * BLOCK_TOKENS..(b + 1) * BLOCK_TOKENS])?;
            }
        } else {
            owner.chain.truncate(0);
        }
        let blocks = owner.chain.len();
        self.owner = Some(owner);
        Ok(blocks)
    }

    /// Offers full blocks to other sessions of this process. Costs nothing per block but handles: tiles are shared.
    pub(crate) fn publish(&mut self) -> Result<()> {
        let blocks = self.name_blocks()?;
        for b in 0..blocks {
            let Some(owner) = &self.owner else { break };
            let (store, name, tag) =
                (Arc::clone(&owner.store), owner.chain.names()[b], owner.chain.owners()[b]);
            if store.mem().has(&name, Copies::Exact) {
                continue;
            }
            let Some((codec, tiles)) = self.block(b) else { continue };
            if !store.mem().has(&name, Copies::Coded(codec)) {
                store.mem().put(tag, BlockKey { name, codec }, tiles.bytes(), tiles);
            }
        }
        Ok(())
    }

    /// Makes the session durable under `id`. `extra` is the caller's own state and comes back at resume. On error nothing of
    /// this commit is stored and the session is as it was.
    pub fn commit(&mut self, id: &str, extra: &Json) -> Result<CommitReport> {
        self.whole()?;
        let started = Instant::now();
        if id.is_empty() {
            return Err(CoreError::invalid("commit.id", "a session id", "an empty string").into());
        }
        if self.owner.is_none() {
            return Err(CoreError::invalid(
                "session.store",
                "a session opened through a store",
                "a session without one",
            )
            .into());
        }
        self.publish()?;
        let owner = self.owner.clone().expect("checked above");
        let store = Arc::clone(&owner.store);

        // A block that cannot be placed (two codes in one block) ends the chain for this commit; its tiles go into the snapshot.
        let mut blocks = Vec::new();
        for b in 0..owner.chain.len() {
            let Some(block) = self.block(b) else { break };
            blocks.push(block);
        }
        let mut chain = owner.chain.clone();
        chain.truncate(blocks.len());
        let mut reused = 0;
        let mut bytes = Vec::new();
        for (b, (codec, tiles)) in blocks.iter().enumerate() {
            let copies = if codec.is_exact() { Copies::Exact } else { Copies::Coded(*codec) };
            let stored = store.disk().is_some_and(|d| d.has_block(&chain.names()[b], copies));
            if stored {
                reused += 1;
            } else {
                bytes.push((b, *codec, self.block_bytes(tiles)?));
            }
        }
        let snapshot = self.snapshot(blocks.len())?;

        let block_parts: Vec<Vec<&[u8]>> =
            bytes.iter().map(|(_, _, p)| p.iter().map(Vec::as_slice).collect()).collect();
        let snapshot_parts: Vec<&[u8]> = snapshot.iter().map(Vec::as_slice).collect();
        let mut drafts = Vec::with_capacity(bytes.len() + 1);
        for ((b, codec, _), parts) in bytes.iter().zip(&block_parts) {
            drafts.push(
                Draft::block(&chain, *b, &self.ids, *codec, parts)
                    .expect("the chain and the ids hold this block"),
            );
        }
        chain.set_key(&owner.key);
        let mut record = Record::new(&owner.key, id, &chain, self.ids.clone());
        record.lineage = self.lineage_of(self.seen as usize / BLOCK_TOKENS);
        let tail = record.tail().to_vec();
        let draft = Draft::snapshot(&chain, record.lineage, &tail, CodecId::EXACT, &snapshot_parts)?;
        let snapshot_bytes = draft.payload_len();
        record.snapshot = Some(draft.name);
        record.state = serde_json::to_vec(&State {
            dtype: self.options.dtype,
            keys: self.options.keys,
            recipe: self.options.recipe.to_json(),
            seen: self.seen,
            exact_to: self.exact_to,
            private: self.private.map(str::to_owned),
            policies: self.save_policies(),
            wants: self.wants.iter().cloned().collect(),
            stats: self.stats,
            shared_tokens: owner.share.as_ref().map_or(0, |s| s.tokens),
            extra: extra.clone(),
        })
        .map_err(|e| CoreError::malformed("session state", e))?;
        drafts.push(draft);
        let done = store.commit(&drafts, &mut record)?;
        Ok(CommitReport {
            tokens: self.seen,
            new_blocks: done.written.saturating_sub(1),
            reused_blocks: reused + done.already_stored,
            new_bytes: done.bytes,
            snapshot_bytes,
            private: self.private.map(str::to_owned),
            durable: done.durable,
            ms: started.elapsed().as_secs_f64() * 1e3,
        })
    }

    /// Snapshot parts: header; per layer, head and run the inline tiles, columns and bias; the logits.
    fn snapshot(&self, blocks: usize) -> Result<Vec<Vec<u8>>> {
        let mut header = Vec::new();
        let mut parts = vec![Vec::new()];
        for run_list in self.tables.iter().flatten() {
            let mut runs = Vec::new();
            for (r, run) in run_list.runs.iter().enumerate() {
                let shared = self.in_blocks(run, r, blocks);
                let inline: Vec<u32> =
                    (0..run.tiles.len() as u32).filter(|&t| shared[t as usize].is_none()).collect();
                let mut bytes = Vec::new();
                let mut push = |buf: &Buf| -> Result<()> {
                    let at = bytes.len();
                    bytes.resize(at + buf.bytes(), 0);
                    Ok(self.backend.read(buf, &mut bytes[at..])?)
                };
                for &t in &inline {
                    push(&run.tiles[t as usize].codes)?;
                }
                for (_, col) in &run.meta.cols {
                    push(&col.slice(0..run.tiles.len() * 128)?)?;
                }
                if let Some(bias) = &run.meta.bias {
                    push(bias)?;
                }
                let (from, list) = match &run.meta.pos {
                    Pos::From(p) => (Some(*p), Vec::new()),
                    Pos::List(l) => (None, l.to_vec()),
                };
                runs.push(RunState {
                    tags: code_tags(&run.codes)?,
                    rows: run.rows,
                    from,
                    list,
                    inline,
                    cols: run.meta.cols.iter().map(|c| c.0.0).collect(),
                    bias: run.meta.bias.is_some(),
                });
                parts.push(bytes);
            }
            header.push(runs);
        }
        parts[0] = serde_json::to_vec(&header).map_err(|e| CoreError::malformed("snapshot header", e))?;
        parts.push(self.logits.iter().flatten().flat_map(|x| x.to_le_bytes()).collect());
        Ok(parts)
    }

    /// What its blocks are named after, besides tokens and tenant.
    pub(crate) fn identity(&self) -> Identity {
        let space = u8::from(self.stack.runs[0][0].space == KeySpace::Plain);
        let dtype = match Format::from(self.options.dtype) {
            Format::F32 => 0,
            Format::F16 => 1,
            _ => 2,
        };
        Identity::new(self.layout.fingerprint, &self.layout.shape_bytes(), space, dtype)
    }
}

impl From<kvasir_store::Miss> for Error {
    fn from(miss: kvasir_store::Miss) -> Self {
        Self::Core(CoreError::malformed("stored session", miss))
    }
}
