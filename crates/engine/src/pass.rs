//! A pass: new rows of one session going through the model. Its rows exist when it ends; if it is discarded they never did.
//!
//! `attend` writes the pass's keys and values into the open run (or over rows that are there already), then folds all runs.
//! Query rows may be fewer than key rows. A probe pass puts its rows into a run of its own, which is dropped at the end, so
//! no byte of a table changes.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use kvasir_core::{
    Attend, AttendSeq, Buf, Call, ColId, ColumnUpdate, Error as CoreError, Go, Hooks, Mask, Point, Pos,
    Queries, Reduce, Result as CoreResult, Rope, RopeArg, RowWrite, Rows, Run, Source, TILE_ROWS, Table,
    Want, check,
};

use crate::cancel::Cancel;
use crate::session::Session;
use crate::{Error, Result};

/// Queries kept per layer where a floor is set.
const FLOOR_QUERIES: usize = 4;

/// What becomes of a pass's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Keep,
    /// They only ask: attention goes into this column, the rows are dropped.
    Probe(ColId),
}

/// New rows of one session on their way through the model.
pub struct Pass {
    kind: Kind,
    ids: Vec<u32>,
    pos: Vec<u32>,
    /// Positions from here on are new.
    from: u32,
    before: Vec<Vec<Table>>,
    wants: VecDeque<Want>,
    patched: HashSet<(usize, usize, usize)>,
    attended: Vec<bool>,
    probes: Vec<Option<(Buf, Vec<u32>)>>,
}

impl Pass {
    /// Begins a pass over `pos` (ascending): positions the session has are computed anew, the others must follow it without
    /// a gap. `ids` are the tokens, or empty where an engine does not know them.
    pub fn begin(session: &mut Session, ids: &[u32], pos: &[u32]) -> Result<Self> {
        session.usable()?;
        check::at_least("pass.rows", pos.len(), 1)?;
        if !ids.is_empty() {
            check::equal("pass.ids", "tokens", pos.len(), ids.len())?;
        }
        if let Some((a, b)) = pos.iter().zip(pos.iter().skip(1)).find(|(a, b)| a >= b) {
            return Err(
                CoreError::invalid("pass.pos", "ascending positions", format_args!("{b} after {a}")).into()
            );
        }
        let new = pos.partition_point(|&p| p < session.seen);
        if let Some((i, &p)) = pos[new..].iter().enumerate().find(|&(i, &p)| p != session.seen + i as u32) {
            return Err(CoreError::invalid("pass.pos", session.seen + i as u32, p).into());
        }
        session.fits(pos.len() - new)?;
        if new > 0 && session.is_packed() {
            return Err(CoreError::unsupported("computing rows anew under packed positions").into());
        }
        Ok(Self::start(session, Kind::Keep, ids, pos))
    }

    /// Begins a probe behind the session's last position: its attention over the rows that are there goes into `col`.
    pub fn probe(session: &mut Session, ids: &[u32], col: ColId) -> Result<Self> {
        session.usable()?;
        check::at_least("probe.tokens", ids.len(), 1)?;
        check::at_least("probe.column", session.stack.columns.len(), col.0 as usize + 1)?;
        let pos: Vec<u32> = (session.seen..session.seen + ids.len() as u32).collect();
        for table in session.tables.iter_mut().flatten() {
            let codes = table.runs[0].codes.clone();
            table.runs.push(Run::new(codes));
        }
        let pass = Self::start(session, Kind::Probe(col), ids, &pos);
        Ok(pass)
    }

    fn start(session: &mut Session, kind: Kind, ids: &[u32], pos: &[u32]) -> Self {
        session.in_pass = true;
        let mut before = session.tables.clone();
        if matches!(kind, Kind::Probe(_)) {
            for table in before.iter_mut().flatten() {
                table.runs.pop();
            }
        }
        let layers = session.layout.layers.len();
        Self {
            kind,
            ids: ids.to_vec(),
            pos: pos.to_vec(),
            from: session.seen,
            before,
            wants: session.wants.clone(),
            patched: HashSet::new(),
            attended: vec![false; layers],
            probes: vec![None; layers],
        }
    }

    /// Positions of the pass.
    pub fn pos(&self) -> &[u32] {
        &self.pos
    }

    /// Rows at `pos` can be computed anew: every table has them in the open run.
    pub(crate) fn can_patch(s: &Session, pos: u32) -> bool {
        !s.is_packed() && pos < s.seen && s.tables.iter().flatten().all(|t| find(&t.runs[0], pos).is_some())
    }

    /// The rows of this layer are there.
    pub(crate) fn has_attended(&self, layer: usize) -> bool {
        self.attended[layer]
    }

    /// A layer whose attention failed is as before.
    pub(crate) fn take_back(&self, s: &mut Session, layer: usize) {
        s.tables[layer].clone_from(&self.before[layer]);
    }

    /// Attention of `q` after `k` and `v` have been written. All rows belong to this session; `out` takes the rows of `q`.
    pub fn attend(
        &mut self,
        s: &mut Session,
        layer: usize,
        q: &Rows,
        k: &Rows,
        v: &Rows,
        out: &mut Rows,
    ) -> Result<()> {
        let at = s.layout.layer(layer)?.clone();
        let (h, kv, d, dv) =
            (at.q_heads as usize, at.kv_heads as usize, at.k_dim as usize, at.v_dim as usize);
        check::equal("q.dim", "numbers", h * d, q.dim as usize)?;
        check::equal("k.dim", "numbers", kv * d, k.dim as usize)?;
        check::equal("v.dim", "numbers", kv * dv, v.dim as usize)?;
        check::equal("out.dim", "numbers", h * dv, out.dim as usize)?;
        check::equal("v.rows", "rows", k.len(), v.len())?;
        check::equal("q.bytes", "bytes", q.len() * h * d * 4, q.data.bytes())?;
        check::equal("k.bytes", "bytes", k.len() * kv * d * 4, k.data.bytes())?;
        check::equal("v.bytes", "bytes", k.len() * kv * dv * 4, v.data.bytes())?;
        check::equal("out.bytes", "bytes", q.len() * h * dv * 4, out.data.bytes())?;
        out.pos.clone_from(&q.pos);
        out.of = std::iter::once(0..q.len() as u32).collect();

        let rope = rope_of(s, layer)?;
        self.write(s, layer, k, v, rope.as_ref())?;
        let columns = self.columns(s, layer, false)?;

        let packed = s.is_packed();
        let mut q_pos: Arc<[u32]> = q.pos.as_slice().into();
        let heads: Vec<Vec<Run>> = s.tables[layer]
            .iter()
            .map(|table| {
                let mut first = 0;
                let place = |run: &Run| {
                    let mut run = run.clone();
                    if packed {
                        run.meta.pos = Pos::From(first);
                        first += run.rows;
                    }
                    run
                };
                table.runs.iter().map(place).collect()
            })
            .collect();
        if packed {
            // The newest row of the table is the newest query's own.
            let rows = s.tables[layer][0].rows();
            let newest = k.pos.last().copied().unwrap_or_default();
            if s.tables[layer].iter().any(|t| t.rows() != rows) {
                return Err(
                    CoreError::unsupported("packed positions over kv heads of different lengths").into()
                );
            }
            q_pos = q.pos.iter().map(|p| rows.saturating_sub((newest + 1).saturating_sub(*p))).collect();
        }
        s.backend.submit(Call::Attend(Box::new(Attend {
            q: q.data.clone(),
            q_rope: Arc::clone(&q_pos),
            q_pos,
            out: out.data.clone(),
            lse: None,
            q_heads: at.q_heads,
            kv_heads: at.kv_heads,
            k_dim: at.k_dim,
            v_dim: at.v_dim,
            scale: 1.0 / (d as f32).sqrt(),
            rope,
            mask: s.stack.mask,
            window: at.window,
            seqs: vec![AttendSeq { rows: 0..q.len() as u32, heads, pass_from: self.from }],
            columns,
        })))?;
        if s.stack.slots.iter().any(|x| x.floor.is_some()) {
            let keep = q.len().min(FLOOR_QUERIES);
            let row = h * d * 4;
            let dst = s.backend.alloc(keep * row)?;
            let src = q.data.slice((q.len() - keep) * row..q.len() * row)?;
            s.backend.submit(Call::Copy { src, dst: dst.clone() })?;
            self.probes[layer] = Some((dst, q.pos[q.len() - keep..].to_vec()));
        }
        self.attended[layer] = true;
        Ok(())
    }

    /// Takes keys and values of a layer whose attention is computed elsewhere. Score columns keep what they had.
    pub fn append(&mut self, s: &mut Session, layer: usize, k: &Rows, v: &Rows) -> Result<()> {
        let rope = rope_of(s, layer)?;
        self.write(s, layer, k, v, rope.as_ref())?;
        self.columns(s, layer, true)?;
        self.attended[layer] = true;
        Ok(())
    }

    /// Puts the rows of `k` and `v` into their tiles.
    fn write(
        &mut self,
        s: &mut Session,
        layer: usize,
        k: &Rows,
        v: &Rows,
        rope: Option<&RopeArg>,
    ) -> Result<()> {
        let at = s.layout.layers[layer].clone();
        let mut writes = Vec::with_capacity(k.len() * at.kv_heads as usize);
        let r = if self.kind == Kind::Keep { 0 } else { s.tables[layer][0].runs.len() - 1 };
        let codes = s.tables[layer][0].runs[r].codes.clone();
        for head in 0..at.kv_heads as usize {
            for (src, &pos) in k.pos.iter().enumerate() {
                let run = &s.tables[layer][head].runs[r];
                let there = if pos < self.from { find(run, pos) } else { None };
                if pos < self.from && there.is_none() {
                    let what = format!("computing position {pos} anew: its row is evicted or in a coded run");
                    return Err(CoreError::unsupported(what).into());
                }
                let idx = there.unwrap_or(run.rows as usize);
                let (t, slot) = (idx / TILE_ROWS, idx % TILE_ROWS);
                if t == run.tiles.len() {
                    let tile = s.new_tile(layer, head, r, &codes)?;
                    Arc::make_mut(&mut s.tables[layer][head].runs[r].tiles).push(tile);
                } else if !run.tiles[t].own || (there.is_some() && self.patched.insert((layer, head, t))) {
                    // Somebody else reads this tile, or it must survive a discarded pass.
                    let old = run.tiles[t].codes.clone();
                    let tile = s.new_tile(layer, head, r, &codes)?;
                    s.backend.submit(Call::Copy { src: old, dst: tile.codes.clone() })?;
                    Arc::make_mut(&mut s.tables[layer][head].runs[r].tiles)[t] = tile;
                    self.patched.insert((layer, head, t));
                }
                let run = &mut s.tables[layer][head].runs[r];
                if there.is_none() {
                    run.meta.pos.push(idx, pos);
                    run.rows += 1;
                }
                writes.push(RowWrite {
                    src: src as u32,
                    head: head as u16,
                    slot: slot as u8,
                    tile: run.tiles[t].codes.clone(),
                });
            }
        }
        let rope = (codes[0].space == kvasir_core::KeySpace::Rotated)
            .then(|| rope.map(|r| (r.clone(), k.pos.as_slice().into())))
            .flatten();
        s.backend.submit(Call::Append {
            k: k.data.clone(),
            v: v.data.clone(),
            kv_heads: at.kv_heads,
            k_dim: at.k_dim,
            v_dim: at.v_dim,
            codes,
            rope,
            writes,
        })?;
        Ok(())
    }

    /// Gives every run fresh column buffers and says which the attention updates. Old buffers are never written, so a
    /// discarded pass leaves them as they were. `keep`: no attention follows, so every column stays what it was.
    fn columns(&self, s: &mut Session, layer: usize, keep: bool) -> Result<Vec<ColumnUpdate>> {
        let mut updates = Vec::new();
        for c in 0..s.stack.columns.len() {
            let Source::Attention(probe) = s.stack.columns[c].clone() else {
                return Err(CoreError::unsupported(format!("column source {:?}", s.stack.columns[c])).into());
            };
            let id = ColId(c as u16);
            let (update, carry) = match (self.kind, &probe.queries) {
                (Kind::Keep, Queries::Wanted) => (false, true),
                (Kind::Keep, Queries::All) => (true, true),
                (Kind::Keep, _) => (true, false),
                (Kind::Probe(col), _) => (col == id, col != id),
            };
            let carry = keep || carry || (probe.reduce == Reduce::Max && probe.queries == Queries::All);
            let mut targets: Vec<Vec<Option<Buf>>> = Vec::new();
            for table in &mut s.tables[layer] {
                let mut of_head = Vec::new();
                for run in &mut table.runs {
                    if run.tiles.is_empty() {
                        of_head.push(None);
                        continue;
                    }
                    let bytes = run.tiles.len() * TILE_ROWS * 4;
                    let old = run.meta.cols.iter().position(|x| x.0 == id);
                    let fresh = s.backend.alloc(bytes)?;
                    if let (true, Some(i)) = (carry, old) {
                        let src = run.meta.cols[i].1.clone();
                        let n = src.bytes().min(bytes);
                        s.backend.submit(Call::Copy { src: src.slice(0..n)?, dst: fresh.slice(0..n)? })?;
                    }
                    match old {
                        Some(i) => run.meta.cols[i].1 = fresh.clone(),
                        None => run.meta.cols.push((id, fresh.clone())),
                    }
                    of_head.push(Some(fresh));
                }
                targets.push(of_head);
            }
            if update {
                updates.push(ColumnUpdate { probe, targets: vec![targets] });
            }
        }
        Ok(updates)
    }

    /// The pass's rows exist from now on; triggers are checked and plans run. `prefill_end`: this was the last pass of a prefill.
    pub fn end(self, s: &mut Session, prefill_end: bool) -> Result<()> {
        if let Some(layer) = self.attended.iter().position(|a| !a) {
            self.discard(s);
            return Err(CoreError::invalid(
                "pass",
                "attend called for every layer",
                format_args!("none for layer {layer}"),
            )
            .into());
        }
        s.in_pass = false;
        match self.kind {
            Kind::Probe(_) => {
                for table in s.tables.iter_mut().flatten() {
                    table.runs.pop();
                }
                return s.wake_wanted();
            }
            Kind::Keep => {}
        }
        let new = self.pos.partition_point(|&p| p < self.from);
        if new > 0 {
            s.private = s.private.or(Some("rows were computed anew"));
        }
        for (i, &pos) in self.pos.iter().enumerate() {
            match self.ids.get(i) {
                Some(&id) if (pos as usize) < s.ids.len() => s.ids[pos as usize] = id,
                Some(&id) if pos as usize == s.ids.len() => s.ids.push(id),
                _ => s.private = s.private.or(Some("rows came without token ids")),
            }
        }
        // Exact as long as nothing lossy was there to be read, and nothing but the past was.
        let dense = |table: &Table| {
            table.runs.iter().all(|r| r.rows == 0 || r.codes == table.runs[0].codes && r.meta.bias.is_none())
        };
        let causal = s.stack.mask == Mask::Causal;
        if s.exact_to == self.from && s.private.is_none() && causal && self.before.iter().flatten().all(dense)
        {
            s.exact_to += (self.pos.len() - new) as u32;
        }
        s.seen += (self.pos.len() - new) as u32;
        s.logits = None;
        for (to, from) in s.probes.iter_mut().zip(self.probes) {
            if from.is_some() {
                *to = from;
            }
        }
        s.wake(prefill_end)
    }

    /// Forgets the pass: the session is as it was before `begin`.
    pub fn discard(self, s: &mut Session) {
        s.tables = self.before;
        s.wants = self.wants;
        s.in_pass = false;
    }
}

/// The rotation of a layer.
pub(crate) fn rope_of(s: &Session, layer: usize) -> Result<Option<RopeArg>> {
    let kind = s.layout.layers[layer].rope;
    Ok(match kind {
        Rope::None => None,
        Rope::Half(side) | Rope::Adjacent(side) => {
            Some(RopeArg { kind, inv_freq: Arc::clone(s.layout.side(side)?) })
        }
    })
}

/// Index of the row at `pos` in a run.
fn find(run: &Run, pos: u32) -> Option<usize> {
    match &run.meta.pos {
        Pos::From(p) => pos.checked_sub(*p).map(|i| i as usize).filter(|&i| i < run.rows as usize),
        Pos::List(l) => l.iter().position(|&p| p == pos),
    }
}

/// Passes of the sequences of one batch, as the model's hooks.
pub struct Passes<'a> {
    seqs: Vec<(Pass, &'a mut Session)>,
    cancel: Cancel,
}

impl<'a> Passes<'a> {
    /// Sequence `i` of the batch is `seqs[i]`.
    pub fn new(seqs: Vec<(Pass, &'a mut Session)>) -> Self {
        Self { seqs, cancel: Cancel::default() }
    }

    /// Lets `cancel` stop the pass at the next layer.
    #[must_use]
    pub fn with_cancel(mut self, cancel: &Cancel) -> Self {
        self.cancel = cancel.clone();
        self
    }

    /// Ends every pass; the first error is returned after all have ended.
    pub fn end(self, prefill_end: bool) -> Result<()> {
        let mut first = Ok(());
        for (pass, session) in self.seqs {
            first = first.and(pass.end(session, prefill_end));
        }
        first
    }

    /// Forgets every pass.
    pub fn discard(self) {
        for (pass, session) in self.seqs {
            pass.discard(session);
        }
    }

    /// Session `i`.
    pub fn session(&mut self, i: usize) -> &mut Session {
        self.seqs[i].1
    }

    /// Pass and session `i`, for hooks built around these.
    pub fn seq(&mut self, i: usize) -> (&mut Pass, &mut Session) {
        let (pass, session) = &mut self.seqs[i];
        (pass, session)
    }
}

impl Hooks for Passes<'_> {
    /// Serves a `Want::Rows` that starts at this layer by shrinking the rows to it. Growing needs hidden rows, which the
    /// hooks of a method bring.
    fn enter(&mut self, at: Point, x: &mut Rows, _gate: Option<&Buf>) -> CoreResult<Go> {
        self.cancel.check()?;
        if at.part != kvasir_core::Part::Attention {
            return Ok(Go::Run);
        }
        let mut keep: Option<Vec<u32>> = None;
        for (i, (_, session)) in self.seqs.iter_mut().enumerate() {
            let due = |w: &Want| matches!(w, Want::Rows { from_layer, .. } if *from_layer == at.layer && at.layer > 0);
            let Some(w) = session.wants.iter().position(due) else { continue };
            let Some(Want::Rows { pos, .. }) = session.wants.remove(w) else { continue };
            let of = x.of[i].clone();
            let keep = keep.get_or_insert_with(|| (0..x.len() as u32).collect());
            keep.retain(|r| !of.contains(r) || pos.binary_search(&x.pos[*r as usize]).is_ok());
        }
        if let (Some(keep), Some((_, session))) = (keep, self.seqs.first()) {
            *x = select(session.backend(), x, &keep)?;
        }
        Ok(Go::Run)
    }

    fn attend(&mut self, at: Point, q: &Rows, k: &Rows, v: &Rows, out: &mut Rows) -> CoreResult<()> {
        let (mut pos, mut of) = (Vec::new(), Vec::new());
        for (i, (pass, session)) in self.seqs.iter_mut().enumerate() {
            let mut part = window(out, i)?;
            pass.attend(
                session,
                at.layer as usize,
                &window(q, i)?,
                &window(k, i)?,
                &window(v, i)?,
                &mut part,
            )
            .map_err(|e| match e {
                Error::Core(e) => e,
                other => CoreError::unsupported(other.to_string()),
            })?;
            let start = pos.len() as u32;
            pos.extend(part.pos);
            of.push(start..pos.len() as u32);
        }
        (out.pos, out.of) = (pos, of);
        Ok(())
    }
}

/// The rows of sequence `i` alone.
fn window(rows: &Rows, i: usize) -> CoreResult<Rows> {
    let of =
        rows.of.get(i).cloned().ok_or_else(|| {
            CoreError::invalid("batch.of", format_args!("{} sequences", i + 1), rows.of.len())
        })?;
    let row = rows.dim as usize * 4;
    Ok(Rows {
        data: rows.data.slice(of.start as usize * row..of.end as usize * row)?,
        dim: rows.dim,
        pos: rows.pos[of.start as usize..of.end as usize].to_vec(),
        of: std::iter::once(0..of.end - of.start).collect(),
    })
}

/// A copy of `rows` that holds only the rows `idx` (ascending).
pub fn select(backend: &Arc<dyn kvasir_core::Backend>, rows: &Rows, idx: &[u32]) -> CoreResult<Rows> {
    let row = rows.dim * 4;
    let dst = backend.alloc(idx.len() * row as usize)?;
    backend.submit(Call::Gather {
        src: rows.data.clone(),
        idx: idx.into(),
        row_bytes: row,
        dst: dst.clone(),
    })?;
    let count = |r: &std::ops::Range<u32>| idx.iter().filter(|i| r.contains(i)).count() as u32;
    let mut start = 0;
    let of = rows
        .of
        .iter()
        .map(|r| {
            let range = start..start + count(r);
            start = range.end;
            range
        })
        .collect();
    Ok(Rows { data: dst, dim: rows.dim, pos: idx.iter().map(|&i| rows.pos[i as usize]).collect(), of })
}
