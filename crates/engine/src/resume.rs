//! Resume: a committed session comes back as it was, or from its last good block on through the model.
//!
//! Record, then each block of its chain, from memory or disk, until one is missing; then the snapshot. Nothing is taken from
//! bytes that do not pass every check; what that costs is computed again and said.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use kvasir_core::{
    Call, ColId, Error as CoreError, Layout, Model, Pos, Run, TILE_ROWS, Tile, Want, tile_bytes,
};
use kvasir_store::{BLOCK_TOKENS, CodecId, Copies, Miss};
use serde::Serialize;
use serde_json::Value as Json;

use crate::blocks::{BLOCK_TILES, BlockTiles, SharedPrefix};
use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::commit::{RunState, State};
use crate::drive;
use crate::report::hex;
use crate::session::{Session, SessionOptions};
use crate::{Error, Recipe, Result};

/// What a resume did.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeReport {
    /// Positions of the committed session.
    pub tokens: u32,
    /// Positions whose rows came back; the others are for [`Session::recompute`].
    pub reused: u32,
    /// Why not all of them did; `complete` if they did.
    pub why: String,
    /// Bytes read.
    pub bytes: u64,
    /// Wall time.
    pub ms: f64,
    /// The caller's own state, as committed.
    pub extra: Json,
}

impl Cache {
    /// Brings back the session committed as `id`. What cannot be read is left out from there on; its tokens become a
    /// `Want::Tokens`, which [`recompute`] serves.
    pub fn resume(
        &self,
        id: &str,
        tenant: &str,
        share: Option<SharedPrefix>,
        layout: Arc<Layout>,
    ) -> Result<(Session, ResumeReport)> {
        self.bring_back(id, tenant, share, layout, None)
    }

    /// As `resume`, for a caller who says how the session keeps its rows: `Mismatch` if it was committed otherwise.
    pub fn resume_as(
        &self,
        id: &str,
        tenant: &str,
        share: Option<SharedPrefix>,
        layout: Arc<Layout>,
        options: &SessionOptions,
    ) -> Result<(Session, ResumeReport)> {
        self.bring_back(id, tenant, share, layout, Some(options))
    }

    fn bring_back(
        &self,
        id: &str,
        tenant: &str,
        share: Option<SharedPrefix>,
        layout: Arc<Layout>,
        expected: Option<&SessionOptions>,
    ) -> Result<(Session, ResumeReport)> {
        let started = Instant::now();
        let key = self.store.tenant(tenant)?;
        let record = match self.store.record(&key, id) {
            Ok(record) => record,
            Err(Miss::NotFound) => return Err(Error::NoSession { id: id.to_owned() }),
            Err(other) => return Err(other.into()),
        };
        let state: State =
            serde_json::from_slice(&record.state).map_err(|e| CoreError::malformed("session record", e))?;
        let options =
            SessionOptions { dtype: state.dtype, keys: state.keys, recipe: Recipe::parse(&state.recipe)? };
        if let Some(expected) = expected {
            expect_options(id, &options, expected)?;
        }
        let share = share.map(|s| SharedPrefix { tokens: state.shared_tokens, ..s });
        let mut session = self.session(tenant, share, layout, options)?;
        if session.identity() != record.identity {
            return Err(Error::Mismatch {
                id: id.to_owned(),
                field: "model",
                stored: hex(&record.identity.fingerprint[..8]),
                given: hex(&session.layout.fingerprint[..8]),
            });
        }
        let owner = session.owner.clone().expect("opened through a store");
        let mut keys = vec![&owner.key];
        keys.extend(owner.share.as_ref().map(|s| &s.key));
        let mut report =
            ResumeReport { tokens: state.seen, extra: state.extra.clone(), ..ResumeReport::default() };

        let mut why = None;
        let mut blocks = Vec::new();
        let chain = record.chain(&keys).unwrap_or_else(|| owner.chain.clone());
        if let Some(next) = record.blocks.get(chain.len()) {
            let known = keys.iter().any(|k| k.tag() == next.owner);
            let what = if known {
                "its name is not that of its tokens"
            } else {
                "the key of its share group was not given"
            };
            why = Some(format!("block {}: {what}", chain.len()));
        }
        let snapshot = self.read_snapshot(&session, &record);
        let held = snapshot.as_ref().map(|s| s.codes_of_blocks(&session)).unwrap_or_default();
        for b in 0..chain.len() {
            match self.read_block(&session, &chain, b, &record.ids, held.get(&b).copied()) {
                Ok((codec, tiles, bytes)) => {
                    report.bytes += bytes;
                    blocks.push((codec, tiles));
                }
                Err(miss) => {
                    why = Some(format!("block {b}: {miss}"));
                    break;
                }
            }
        }
        if why.is_none() {
            match snapshot.and_then(|s| s.restore(&mut session, &state, &blocks)) {
                Ok(bytes) => report.bytes += bytes,
                Err(reason) => why = Some(format!("tail: {reason}")),
            }
        }
        if why.is_none() {
            for (slot, saved) in
                session.stack.slots.iter_mut().zip(state.policies.as_array().into_iter().flatten())
            {
                slot.policy.load(saved)?;
            }
            session.ids.clone_from(&record.ids);
            session.seen = state.seen;
            session.exact_to = state.exact_to.min(state.seen);
            session.private = state.private.as_deref().map(known_reason);
            session.wants = state.wants.into();
            session.stats = state.stats;
        } else {
            // Start over and take what can be had: leading blocks, then the model.
            let mut fresh = self.session(
                tenant,
                owner.share.clone(),
                Arc::clone(&session.layout),
                session.options.clone(),
            )?;
            if state.private.is_none() {
                for (b, (codec, tiles)) in blocks.iter().enumerate() {
                    if !fresh.take_block(b, *codec, tiles)? {
                        break;
                    }
                }
            }
            fresh.ids = record.ids[..fresh.seen as usize].to_vec();
            fresh.exact_to = state.exact_to.min(fresh.seen);
            if record.ids.len() < state.seen as usize {
                return Err(CoreError::malformed(
                    "stored session",
                    "its rows are gone and its tokens were never known",
                )
                .into());
            }
            fresh.wants.push_back(Want::Tokens(fresh.seen..state.seen));
            session = fresh;
        }
        if let Some(owner) = &mut session.owner {
            owner.chain = chain;
            owner.chain.truncate(if session.private.is_some() {
                0
            } else {
                session.seen as usize / BLOCK_TOKENS
            });
        }
        report.reused = session.seen;
        report.why = why.unwrap_or_else(|| "complete".to_owned());
        report.ms = started.elapsed().as_secs_f64() * 1e3;
        session.pending = record.ids[(session.seen as usize).min(record.ids.len())..].to_vec();
        tracing::debug!(reused = report.reused, why = %report.why, "resumed");
        Ok((session, report))
    }

    /// The snapshot of a record, or the reason why there is none.
    fn read_snapshot(&self, s: &Session, record: &kvasir_store::Record) -> Result<Snapshot, String> {
        let expect = record.snapshot(Copies::Exact).ok_or("it was never stored")?;
        let block =
            self.store.disk().ok_or("the store has no folder")?.get(&expect).map_err(|m| m.to_string())?;
        let header: Vec<Vec<RunState>> =
            serde_json::from_slice(block.parts().next().ok_or("it is empty")?).map_err(|e| e.to_string())?;
        let tables: usize = s.tables.iter().map(Vec::len).sum();
        let runs = s.stack.runs.len();
        if header.len() != tables
            || header.iter().any(|t| t.len() != runs)
            || block.parts().len() != 2 + tables * runs
        {
            return Err("it was written for another layout or recipe".into());
        }
        Ok(Snapshot { block, header })
    }
}

/// State behind the blocks of a session, as it was stored.
struct Snapshot {
    block: kvasir_store::Block,
    /// Per layer and head its runs.
    header: Vec<Vec<RunState>>,
}

impl Snapshot {
    /// The codes in which the session held its blocks.
    fn codes_of_blocks(&self, s: &Session) -> HashMap<usize, CodecId> {
        let mut held = HashMap::new();
        for (r, state) in self.header.first().into_iter().flatten().enumerate() {
            let codec = s.codec_of(r);
            let pos = |i: u32| match state.from {
                Some(p) => p.checked_add(i),
                None => state.list.get(i as usize).copied(),
            };
            // A block begins where a tile does; what lies beyond the chain is asked for by nobody.
            let most = state.rows.min((s.layout.context).max(state.list.len() as u32));
            for at in (0..most).step_by(TILE_ROWS) {
                let inline = state.inline.binary_search(&(at / TILE_ROWS as u32)).is_ok();
                if let (false, Some(pos)) = (inline, pos(at)) {
                    held.insert(pos as usize / BLOCK_TOKENS, codec);
                }
            }
        }
        held
    }

    /// Rebuilds every run from the snapshot and the blocks. Returns the bytes read, or the reason.
    fn restore(
        &self,
        s: &mut Session,
        state: &State,
        blocks: &[(CodecId, Arc<BlockTiles>)],
    ) -> Result<u64, String> {
        let parts: Vec<&[u8]> = self.block.parts().collect();
        let (header, runs) = (&self.header, s.stack.runs.len());
        let mut part = parts[1..].iter();
        let mut lh = 0;
        for layer in 0..s.tables.len() {
            let dims = s.layout.layers[layer].clone();
            for head in 0..s.tables[layer].len() {
                for r in 0..runs {
                    let bytes = part.next().ok_or("a part is missing")?;
                    let run = rebuild(
                        s,
                        &header[lh][r],
                        r,
                        bytes,
                        lh,
                        state.seen,
                        blocks,
                        (dims.k_dim.into(), dims.v_dim.into()),
                    )
                    .map_err(|e| e.to_string())?
                    .ok_or("a run does not fit")?;
                    s.tables[layer][head].runs[r] = run;
                }
                lh += 1;
                // Every position once; all of them where nothing was dropped.
                let rows = s.visible(&s.tables[layer][head], None);
                let twice = rows.windows(2).any(|w| w[0].pos == w[1].pos);
                if twice || (state.private.is_none() && rows.len() != state.seen as usize) {
                    return Err("its positions do not add up".into());
                }
            }
        }
        let logits = parts[parts.len() - 1];
        s.logits = (!logits.is_empty())
            .then(|| logits.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect());
        Ok(self.block.stored_len())
    }
}

impl Session {
    /// Serves `Want::Tokens`: computes the tokens a resume could not bring back. Returns how many went through the model.
    pub fn recompute(&mut self, model: &dyn Model, cancel: &Cancel) -> Result<u32> {
        if !self.wants.iter().any(|w| matches!(w, Want::Tokens(_))) {
            return Ok(0);
        }
        let from = self.seen;
        let ids = std::mem::take(&mut self.pending);
        if let Err(e) = drive::prefill(model, self, &ids, cancel) {
            // What was computed stays; the rest is still wanted.
            self.pending = ids[(self.seen - from) as usize..].to_vec();
            return Err(e);
        }
        self.wants.retain(|w| !matches!(w, Want::Tokens(_)));
        self.publish()?;
        Ok(ids.len() as u32)
    }
}

/// `Mismatch` where a session was committed under other options than the caller expects.
fn expect_options(id: &str, stored: &SessionOptions, given: &SessionOptions) -> Result<()> {
    let pairs = [
        ("kv", format!("{:?}", stored.dtype).to_lowercase(), format!("{:?}", given.dtype).to_lowercase()),
        ("recipe", stored.recipe.to_json().to_string(), given.recipe.to_json().to_string()),
        ("keys", format!("{:?}", stored.keys), format!("{:?}", given.keys)),
    ];
    match pairs.into_iter().find(|(_, stored, given)| stored != given) {
        None => Ok(()),
        Some((field, stored, given)) => Err(Error::Mismatch { id: id.to_owned(), field, stored, given }),
    }
}

/// One run from its state.
fn rebuild(
    s: &Session,
    state: &RunState,
    r: usize,
    bytes: &[u8],
    lh: usize,
    seen: u32,
    blocks: &[(CodecId, Arc<BlockTiles>)],
    (k_dim, v_dim): (usize, usize),
) -> Result<Option<Run>> {
    let codes = s.stack.runs[r].clone();
    let mut run = Run::new(codes.clone());
    run.rows = state.rows;
    run.meta.pos = match state.from {
        Some(p) if p.checked_add(state.rows).is_some_and(|end| end <= seen || state.rows == 0) => {
            Pos::From(p)
        }
        None if state.list.len() == state.rows as usize && state.list.iter().all(|&p| p < seen) => {
            Pos::List(Arc::new(state.list.clone()))
        }
        _ => return Ok(None),
    };
    let count = (state.rows as usize).div_ceil(TILE_ROWS);
    let tile = tile_bytes(&codes, k_dim, v_dim)?;
    let beside = count * TILE_ROWS * 4;
    let size = state.inline.len() * tile + (state.cols.len() + usize::from(state.bias)) * beside;
    if crate::blocks::code_tags(&codes)? != state.tags || bytes.len() != size || state.inline.len() > count {
        return Ok(None);
    }
    // Every tile is here or in a block: a header cannot ask for more memory than that.
    if count > state.inline.len() + blocks.len() * BLOCK_TILES
        || state.cols.iter().any(|&c| c as usize >= s.stack.columns.len())
    {
        return Ok(None);
    }
    if count == 0 {
        return Ok(Some(run));
    }
    let mem = if bytes.is_empty() { None } else { Some(s.backend.upload(bytes)?) };
    let piece = |at: usize, len: usize| mem.as_ref().map(|m| m.slice(at..at + len)).transpose();
    let (mut tiles, mut seals) = (Vec::with_capacity(count), Vec::new());
    for t in 0..count {
        if let Ok(i) = state.inline.binary_search(&(t as u32)) {
            let Some(codes) = piece(i * tile, tile)? else { return Ok(None) };
            tiles.push(Tile { codes, own: true });
        } else {
            let pos = run.meta.pos.at(t * TILE_ROWS) as usize;
            let Some((codec, block)) = blocks.get(pos / BLOCK_TOKENS) else { return Ok(None) };
            let stored = block.tile(lh, pos % BLOCK_TOKENS / TILE_ROWS);
            // A tile of a block sits in this run only in the run's own code.
            if *codec == s.codec_of(r) {
                tiles.push(stored);
            } else if codec.is_exact() && r != 0 {
                // The same rows as they were computed: coded again they are what the session held.
                let fresh = Tile { codes: s.backend.alloc(tile)?, own: true };
                seals.push((stored.codes, fresh.codes.clone(), TILE_ROWS as u8));
                tiles.push(fresh);
            } else {
                return Ok(None);
            }
        }
    }
    run.tiles = Arc::new(tiles);
    if !seals.is_empty() {
        s.backend.submit(Call::Seal {
            from_codes: s.stack.runs[0].clone(),
            to_codes: codes,
            k_dim: k_dim as u16,
            v_dim: v_dim as u16,
            tiles: seals,
        })?;
    }
    let mut at = state.inline.len() * tile;
    for &c in &state.cols {
        let Some(buf) = piece(at, beside)? else { return Ok(None) };
        run.meta.cols.push((ColId(c), buf));
        at += beside;
    }
    if state.bias {
        run.meta.bias = piece(at, beside)?;
    }
    Ok(Some(run))
}

/// The reasons a session can be private, as constants.
fn known_reason(reason: &str) -> &'static str {
    ["rows were evicted", "rows were computed anew", "rows came without token ids", "rows of another engine"]
        .into_iter()
        .find(|r| *r == reason)
        .unwrap_or("private when it was committed")
}
