//! Blocks: 64 tokens of every layer and kv head, as the store names and keeps them.
//!
//! Payload parts, in order: one per layer and kv head with the block's two tile records; then, where the rows are coded and
//! the block holds the session's sinks, one per layer and kv head with the dense tile of the sinks.

use std::sync::Arc;

use kvasir_core::{Buf, Codes, HIDDEN, Pos, Run, TILE_ROWS, Tile, tile, tile_bytes};
use kvasir_store::{BLOCK_TOKENS, CodecId, Lineage, TenantKey};

use crate::Result;
use crate::session::Session;

/// Tiles of a block.
pub(crate) const BLOCK_TILES: usize = BLOCK_TOKENS / TILE_ROWS;

/// Tiles of one block in backend memory: what the RAM tier holds and sessions share.
#[derive(Debug)]
pub struct BlockTiles {
    /// Layer by layer, head by head, two tiles each.
    tiles: Vec<Buf>,
    /// Layer by layer, head by head, the dense tile of the sinks; empty where there is none.
    sinks: Vec<Buf>,
}

impl BlockTiles {
    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.tiles.iter().chain(&self.sinks).map(|b| b.bytes() as u64).sum()
    }

    /// Tile `half` of layer and head number `lh`.
    pub(crate) fn tile(&self, lh: usize, half: usize) -> Tile {
        Tile { codes: self.tiles[lh * BLOCK_TILES + half].clone(), own: false }
    }
}

/// A prompt prefix that several tenants share under a key of their own.
#[derive(Clone)]
pub struct SharedPrefix {
    /// Key of the group; whoever has it can find the blocks.
    pub key: TenantKey,
    /// Blocks that lie wholly within the first `tokens` are the group's.
    pub tokens: u32,
}

impl Session {
    /// The code that says how rows in run `run` are stored.
    pub(crate) fn codec_of(&self, run: usize) -> CodecId {
        let codes = &self.stack.runs[run];
        if *codes == self.stack.runs[0] {
            return CodecId::EXACT;
        }
        CodecId::of(serde_json::json!({ "codes": codes, "sinks": self.stack.sinks }).to_string().as_bytes())
    }

    /// Lossy codes in which this session takes rows that it finds. None under a floor: how far coded rows are from those
    /// that were computed can be measured only by coding them here.
    pub(crate) fn found_codes(&self) -> Vec<CodecId> {
        if self.stack.slots.iter().any(|s| s.floor.is_some()) {
            return Vec::new();
        }
        let runs = (1..self.stack.runs.len()).filter(|&r| Some(r) != self.stack.sink_run);
        runs.map(|r| self.codec_of(r)).filter(|c| !c.is_exact()).collect()
    }

    /// Codes of runs in which this session can take a block, coldest first.
    pub(crate) fn run_of(&self, codec: CodecId) -> Option<usize> {
        (0..self.stack.runs.len()).find(|&r| Some(r) != self.stack.sink_run && self.codec_of(r) == codec)
    }

    /// How the rows of block `b` came to be.
    pub(crate) fn lineage_of(&self, b: usize) -> Lineage {
        let exact = (b + 1) * BLOCK_TOKENS <= self.exact_to as usize;
        if exact { Lineage::Exact } else { Lineage::Derived(self.options.recipe.hash()) }
    }

    /// Where the 32 rows from `pos` on fill one tile: run, tile.
    fn locate(&self, layer: usize, head: usize, pos: u32) -> Option<(usize, usize)> {
        self.tables[layer][head].runs.iter().enumerate().find_map(|(r, run)| {
            if Some(r) == self.stack.sink_run {
                return None;
            }
            let first = match &run.meta.pos {
                Pos::From(p) => pos.checked_sub(*p)? as usize,
                Pos::List(list) => list.iter().position(|&p| p == pos)?,
            };
            let whole = first % TILE_ROWS == 0 && first + TILE_ROWS <= run.rows as usize;
            let straight = whole && (0..TILE_ROWS).all(|i| run.meta.pos.at(first + i) == pos + i as u32);
            straight.then_some((r, first / TILE_ROWS))
        })
    }

    /// The run that holds block `b`, the same for every layer and head, and the tile index of each half per head.
    fn place_of(&self, b: usize) -> Option<(usize, Vec<usize>)> {
        let mut run = None;
        let mut at = Vec::new();
        for (layer, heads) in self.tables.iter().enumerate() {
            for head in 0..heads.len() {
                for half in 0..BLOCK_TILES {
                    let (r, t) = self.locate(layer, head, (b * BLOCK_TOKENS + half * TILE_ROWS) as u32)?;
                    if *run.get_or_insert(r) != r {
                        return None;
                    }
                    at.push(t);
                }
            }
        }
        run.map(|r| (r, at))
    }

    /// The tiles of block `b`, shared from now on: this session copies them before it would write.
    pub(crate) fn block(&mut self, b: usize) -> Option<(CodecId, Arc<BlockTiles>)> {
        let (run, at) = self.place_of(b)?;
        let coded = !self.stack.runs[run][0].format.is_dense();
        let sinks = coded && (b * BLOCK_TOKENS) < self.stack.sinks as usize;
        let (mut tiles, mut sink_tiles) = (Vec::with_capacity(at.len()), Vec::new());
        let mut at = at.into_iter();
        for table in self.tables.iter_mut().flatten() {
            for _ in 0..BLOCK_TILES {
                let t = at.next()?;
                tiles.push(share(&mut table.runs[run], t));
            }
            if let (true, Some(sink)) = (sinks, self.stack.sink_run) {
                sink_tiles.push(share(&mut table.runs[sink], 0));
            }
        }
        Some((self.codec_of(run), Arc::new(BlockTiles { tiles, sinks: sink_tiles })))
    }

    /// The payload parts of a block.
    pub(crate) fn block_bytes(&self, block: &BlockTiles) -> Result<Vec<Vec<u8>>> {
        let read = |bufs: &[Buf]| -> Result<Vec<u8>> {
            let mut out = vec![0; bufs.iter().map(Buf::bytes).sum()];
            let mut at = 0;
            for b in bufs {
                self.backend.read(b, &mut out[at..at + b.bytes()])?;
                at += b.bytes();
            }
            Ok(out)
        };
        block.tiles.chunks(BLOCK_TILES).chain(block.sinks.chunks(1)).map(read).collect()
    }

    /// Payload parts back into tiles; `None` where their sizes do not fit this session.
    pub(crate) fn block_from<'p>(
        &self,
        codec: CodecId,
        parts: impl Iterator<Item = &'p [u8]>,
    ) -> Result<Option<Arc<BlockTiles>>> {
        let Some(run) = self.run_of(codec) else { return Ok(None) };
        let coded = !self.stack.runs[run][0].format.is_dense();
        let mut want = Vec::new();
        for (pass, codes) in [(0, &self.stack.runs[run]), (1, &self.stack.runs[0])] {
            for l in &self.layout.layers {
                let bytes = tile_bytes(codes, l.k_dim as usize, l.v_dim as usize)?;
                want.extend((0..l.kv_heads).map(|_| (pass, bytes)));
            }
        }
        let first = want.len() / 2;
        let parts: Vec<&[u8]> = parts.collect();
        let sinks = coded && parts.len() == want.len();
        if parts.len() != first && !sinks {
            return Ok(None);
        }
        let fits = |(part, (pass, bytes)): (&&[u8], &(i32, usize))| {
            part.len() == if *pass == 0 { bytes * BLOCK_TILES } else { *bytes }
        };
        if !parts.iter().zip(&want).all(fits) {
            return Ok(None);
        }
        let all = parts.concat();
        let mem = self.backend.upload(&all)?;
        let (mut tiles, mut sink_tiles, mut at) = (Vec::new(), Vec::new(), 0);
        for (pass, bytes) in want.iter().take(parts.len()) {
            for _ in 0..if *pass == 0 { BLOCK_TILES } else { 1 } {
                let tile = mem.slice(at..at + bytes)?;
                at += bytes;
                if *pass == 0 { tiles.push(tile) } else { sink_tiles.push(tile) }
            }
        }
        Ok(Some(Arc::new(BlockTiles { tiles, sinks: sink_tiles })))
    }

    /// Appends block `b` behind the rows the session holds. `false`: this session cannot take it.
    pub(crate) fn take_block(&mut self, b: usize, codec: CodecId, block: &BlockTiles) -> Result<bool> {
        let Some(run) = self.run_of(codec) else { return Ok(false) };
        let coded = !self.stack.runs[run][0].format.is_dense();
        let needs_sinks = coded && b * BLOCK_TOKENS < self.stack.sinks as usize;
        if needs_sinks == block.sinks.is_empty() {
            return Ok(false);
        }
        // Room is appended behind whole tiles only.
        if self.tables.iter().flatten().any(|t| t.runs[run].rows as usize % TILE_ROWS != 0) {
            return Ok(false);
        }
        for lh in 0..self.tables.iter().map(Vec::len).sum() {
            let (layer, head) = self.layer_head(lh);
            let bias = self.grown_bias(layer, head, run, b)?;
            let sinks = self.stack.sinks.min(BLOCK_TOKENS as u32);
            let table = &mut self.tables[layer][head];
            let to = &mut table.runs[run];
            for i in 0..BLOCK_TOKENS {
                to.meta.pos.push(to.rows as usize + i, (b * BLOCK_TOKENS + i) as u32);
            }
            to.rows += BLOCK_TOKENS as u32;
            Arc::make_mut(&mut to.tiles).extend((0..BLOCK_TILES).map(|half| block.tile(lh, half)));
            to.meta.bias = bias;
            if let (true, Some(sink)) = (needs_sinks, self.stack.sink_run) {
                let to = &mut table.runs[sink];
                to.tiles = Arc::new(vec![Tile { codes: block.sinks[lh].clone(), own: false }]);
                to.rows = sinks;
                to.meta.pos = Pos::From(0);
            }
        }
        self.seen = ((b + 1) * BLOCK_TOKENS) as u32;
        Ok(true)
    }

    fn layer_head(&self, mut lh: usize) -> (usize, usize) {
        let mut layer = 0;
        while lh >= self.tables[layer].len() {
            lh -= self.tables[layer].len();
            layer += 1;
        }
        (layer, lh)
    }

    /// The bias of a run that is about to take block `b`.
    fn grown_bias(&self, layer: usize, head: usize, run: usize, b: usize) -> Result<Option<Buf>> {
        let to = &self.tables[layer][head].runs[run];
        let hides = |i: usize| self.stack.hides(run, (b * BLOCK_TOKENS + i) as u32);
        if to.meta.bias.is_none() && !(0..BLOCK_TOKENS).any(hides) {
            return Ok(None);
        }
        let mut all = vec![0.0f32; (to.tiles.len() + BLOCK_TILES) * TILE_ROWS];
        if let Some(old) = &to.meta.bias {
            let old = self.backend.read_f32(old)?;
            all[..old.len()].copy_from_slice(&old);
        }
        for i in (0..BLOCK_TOKENS).filter(|&i| hides(i)) {
            all[to.tiles.len() * TILE_ROWS + i / TILE_ROWS * TILE_ROWS + tile::pi(i % TILE_ROWS)] = HIDDEN;
        }
        Ok(Some(self.backend.upload_f32(&all)?))
    }

    /// Tiles of a run that belong to one of the first `blocks` blocks, by tile index: block and half.
    pub(crate) fn in_blocks(&self, run: &Run, r: usize, blocks: usize) -> Vec<Option<(usize, usize)>> {
        let of = |t: usize| {
            let pos = run.meta.pos.at(t * TILE_ROWS) as usize;
            let whole = run.rows_of_tile(t) == TILE_ROWS && pos % TILE_ROWS == 0;
            (Some(r) != self.stack.sink_run && whole && pos < blocks * BLOCK_TOKENS)
                .then_some((pos / BLOCK_TOKENS, pos % BLOCK_TOKENS / TILE_ROWS))
        };
        (0..run.tiles.len()).map(of).collect()
    }
}

/// Tile `t` of a run, marked as read by others.
fn share(run: &mut Run, t: usize) -> Buf {
    if run.tiles[t].own {
        Arc::make_mut(&mut run.tiles)[t].own = false;
    }
    run.tiles[t].codes.clone()
}

/// Codes as the header of a snapshot says them.
pub(crate) fn code_tags(codes: &Codes) -> Result<[u8; 2]> {
    Ok([codes[0].format.tag()?, codes[1].format.tag()?])
}
