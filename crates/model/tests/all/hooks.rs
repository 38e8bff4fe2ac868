//! The smallest cache: f32 rows of one run per kv head, keys after RoPE, causal, nothing dropped.

use std::sync::Arc;

use kvasir_core::{
    Attend, AttendSeq, Backend, Call, Code, Codes, Format, Hooks, Layout, Mask, Point, Result, Rope, RopeArg,
    RowWrite, Rows, Run, TILE_ROWS, Tile, tile_bytes,
};

pub(crate) struct Dense {
    backend: Arc<dyn Backend>,
    layout: Layout,
    codes: Codes,
    /// `[seq][layer][head]`
    runs: Vec<Vec<Vec<Run>>>,
}

impl Dense {
    pub(crate) fn new(backend: &Arc<dyn Backend>, layout: &Layout, seqs: usize) -> Self {
        let codes = [Code::rotated(Format::F32), Code::plain(Format::F32)];
        let layer = |l: &kvasir_core::LayerLayout| vec![Run::new(codes.clone()); l.kv_heads as usize];
        let runs = vec![layout.layers.iter().map(layer).collect(); seqs];
        Self { backend: Arc::clone(backend), layout: layout.clone(), codes, runs }
    }

    fn rope(&self, layer: usize) -> Option<RopeArg> {
        let kind = self.layout.layers[layer].rope;
        match kind {
            Rope::None => None,
            Rope::Half(id) | Rope::Adjacent(id) => {
                Some(RopeArg { kind, inv_freq: Arc::clone(self.layout.side(id).unwrap()) })
            }
        }
    }

    /// Keys after RoPE and values of a layer of sequence 0: `[T, K, D]` each.
    pub(crate) fn rows(&self, layer: usize) -> (Vec<f32>, Vec<f32>) {
        let l = &self.layout.layers[layer];
        let (heads, kd, vd) = (l.kv_heads as usize, l.k_dim as usize, l.v_dim as usize);
        let total = self.runs[0][layer][0].rows as usize;
        let (mut k, mut v) = (vec![0.0; total * heads * kd], vec![0.0; total * heads * vd]);
        for (h, run) in self.runs[0][layer].iter().enumerate() {
            for (i, tile) in run.tiles.iter().enumerate() {
                let rows = run.rows_of_tile(i);
                let k_out = self.backend.alloc(4 * TILE_ROWS * kd).unwrap();
                let v_out = self.backend.alloc(4 * TILE_ROWS * vd).unwrap();
                let call = Call::Decode {
                    codes: self.codes.clone(),
                    k_dim: l.k_dim,
                    v_dim: l.v_dim,
                    tile: tile.codes.clone(),
                    rows: rows as u8,
                    k_out: k_out.clone(),
                    v_out: v_out.clone(),
                };
                self.backend.submit(call).unwrap();
                let (kt, vt) =
                    (self.backend.read_f32(&k_out).unwrap(), self.backend.read_f32(&v_out).unwrap());
                for r in 0..rows {
                    let t = i * TILE_ROWS + r;
                    k[(t * heads + h) * kd..][..kd].copy_from_slice(&kt[r * kd..][..kd]);
                    v[(t * heads + h) * vd..][..vd].copy_from_slice(&vt[r * vd..][..vd]);
                }
            }
        }
        (k, v)
    }
}

impl Hooks for Dense {
    fn attend(&mut self, at: Point, q: &Rows, k: &Rows, v: &Rows, out: &mut Rows) -> Result<()> {
        let layer = at.layer as usize;
        let l = self.layout.layers[layer].clone();
        let mut writes = Vec::new();
        for (s, of) in k.of.iter().enumerate() {
            for (head, run) in self.runs[s][layer].iter_mut().enumerate() {
                for src in of.clone() {
                    let slot = run.rows as usize % TILE_ROWS;
                    if slot == 0 {
                        let codes = self.backend.alloc(tile_bytes(
                            &run.codes,
                            l.k_dim as usize,
                            l.v_dim as usize,
                        )?)?;
                        Arc::make_mut(&mut run.tiles).push(Tile { codes, own: true });
                    }
                    let tile = run.tiles.last().unwrap().codes.clone();
                    writes.push(RowWrite { src, head: head as u16, slot: slot as u8, tile });
                    run.meta.pos.push(run.rows as usize, k.pos[src as usize]);
                    run.rows += 1;
                }
            }
        }
        let rope = self.rope(layer);
        self.backend.submit(Call::Append {
            k: k.data.clone(),
            v: v.data.clone(),
            kv_heads: l.kv_heads,
            k_dim: l.k_dim,
            v_dim: l.v_dim,
            codes: self.codes.clone(),
            rope: rope.clone().map(|r| (r, k.pos.as_slice().into())),
            writes,
        })?;
        let seqs =
            q.of.iter()
                .enumerate()
                .filter(|(_, rows)| !rows.is_empty())
                .map(|(s, rows)| AttendSeq {
                    rows: rows.clone(),
                    heads: self.runs[s][layer].iter().map(|r| vec![r.clone()]).collect(),
                    pass_from: q.pos[rows.start as usize],
                })
                .collect();
        self.backend.submit(Call::Attend(Box::new(Attend {
            q: q.data.clone(),
            q_pos: q.pos.as_slice().into(),
            q_rope: q.pos.as_slice().into(),
            out: out.data.clone(),
            lse: None,
            q_heads: l.q_heads,
            kv_heads: l.kv_heads,
            k_dim: l.k_dim,
            v_dim: l.v_dim,
            scale: 1.0 / f32::from(l.k_dim).sqrt(),
            rope,
            mask: Mask::Causal,
            window: None,
            seqs,
            columns: Vec::new(),
        })))
    }
}
