//! Engines that run their own layers: they hand q, k, v of a pass layer by layer, or all keys and values at once.
//!
//! Rows cross as host slices of f32, q and k not rotated. The engine answers for its fingerprint: what it computes is named
//! after the layout it brought. Rows that come in behind the back of our own runner are nobody's to share.

use std::sync::Arc;
use std::time::Instant;

use kvasir_core::{Backend, LayerLayout, Rows, Want, check};
use serde::{Deserialize, Serialize};

use crate::cache::PrefillReport;
use crate::cancel::Cancel;
use crate::pass::Pass;
use crate::session::Session;
use crate::{Error, Result};

/// Why blocks of a session that took such rows are not shared.
pub(crate) const FOREIGN: &str = "rows of another engine";

/// Order of the rows of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Token, head, channel.
    #[default]
    #[serde(rename = "NHD")]
    Nhd,
    /// Head, token, channel.
    #[serde(rename = "HND")]
    Hnd,
}

impl Session {
    /// Begins a pass of `rows` new rows. `ids` are their tokens, or empty.
    pub fn begin(&mut self, rows: u32, ids: &[u32]) -> Result<Pass> {
        self.usable()?;
        self.fits(rows as usize)?;
        let pos: Vec<u32> = (self.seen..self.seen + rows).collect();
        Pass::begin(self, ids, &pos)
    }

    /// The engine goes on from the rows that were found: what a resume could not bring back is its business.
    fn brought(&mut self) {
        self.pending.clear();
        self.wants.retain(|w| !matches!(w, Want::Tokens(_)));
    }

    /// From now on no block of this session is named: another engine writes into it.
    pub fn mark_foreign(&mut self) {
        self.private = self.private.or(Some(FOREIGN));
    }

    /// Appends rows of all layers at once. k `[L, T, K, D]` or `[L, K, T, D]`, v likewise. On error the session is as before.
    pub fn ingest(
        &mut self,
        k: &[f32],
        v: &[f32],
        rows: u32,
        order: Order,
        ids: &[u32],
    ) -> Result<PrefillReport> {
        let started = Instant::now();
        let layers = self.layout.layers.clone();
        let numbers = |dim: fn(&LayerLayout) -> usize| -> usize {
            layers.iter().map(|l| l.kv_heads as usize * dim(l) * rows as usize).sum()
        };
        check::equal("k", "numbers", numbers(k_dim), k.len())?;
        check::equal("v", "numbers", numbers(v_dim), v.len())?;
        let private = self.private;
        let mut pass = self.begin(rows, ids)?;
        self.mark_foreign();
        let (mut k, mut v) = (k, v);
        for (i, layer) in layers.iter().enumerate() {
            let (k_layer, k_rest) = k.split_at(layer.kv_heads as usize * k_dim(layer) * rows as usize);
            let (v_layer, v_rest) = v.split_at(layer.kv_heads as usize * v_dim(layer) * rows as usize);
            (k, v) = (k_rest, v_rest);
            let heads = layer.kv_heads as usize;
            let done = check::finite("k", k_layer, heads * k_dim(layer))
                .and_then(|()| check::finite("v", v_layer, heads * v_dim(layer)))
                .map_err(Error::from)
                .and_then(|()| {
                    let k = upload(&self.backend, &pass, k_layer, heads, order)?;
                    let v = upload(&self.backend, &pass, v_layer, heads, order)?;
                    pass.append(self, i, &k, &v)
                });
            if let Err(e) = done {
                pass.discard(self);
                self.private = private;
                return Err(e);
            }
        }
        pass.end(self, rows > 1)?;
        self.brought();
        Ok(PrefillReport {
            computed: rows,
            why: FOREIGN.to_owned(),
            ms: started.elapsed().as_secs_f64() * 1e3,
            ..PrefillReport::default()
        })
    }
}

impl Pass {
    /// Attention of one layer, host slices in and out. q and out `[rows, H, D]`, k and v `[rows, K, D]`.
    pub fn attend_host(
        &mut self,
        s: &mut Session,
        layer: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        let at = s.layout.layer(layer)?.clone();
        if self.has_attended(layer) {
            return Err(kvasir_core::Error::invalid("layer", "a layer once in a pass", layer).into());
        }
        let rows = self.pos().len();
        let (qh, kh) = (at.q_heads as usize, at.kv_heads as usize);
        check::equal("q", "numbers", rows * qh * k_dim(&at), q.len())?;
        check::equal("k", "numbers", rows * kh * k_dim(&at), k.len())?;
        check::equal("v", "numbers", rows * kh * v_dim(&at), v.len())?;
        check::equal("out", "numbers", rows * qh * v_dim(&at), out.len())?;
        check::finite("q", q, qh * k_dim(&at))?;
        check::finite("k", k, kh * k_dim(&at))?;
        check::finite("v", v, kh * v_dim(&at))?;
        let backend = Arc::clone(&s.backend);
        let q = upload(&backend, self, q, qh, Order::Nhd)?;
        let k = upload(&backend, self, k, kh, Order::Nhd)?;
        let v = upload(&backend, self, v, kh, Order::Nhd)?;
        let mut got =
            Rows { data: backend.alloc(out.len() * 4)?, dim: (qh * v_dim(&at)) as u32, ..q.clone() };
        if let Err(e) = self.attend(s, layer, &q, &k, &v, &mut got) {
            self.take_back(s, layer);
            return Err(e);
        }
        out.copy_from_slice(&backend.read_f32(&got.data)?);
        Ok(())
    }

    /// Ends the pass of a foreign engine; its rows are offered to other sessions where they can be named.
    pub fn finish(self, s: &mut Session, cancel: &Cancel) -> Result<PrefillReport> {
        let started = Instant::now();
        if let Err(e) = cancel.check() {
            self.discard(s);
            return Err(e.into());
        }
        let rows = self.pos().len() as u32;
        self.end(s, rows > 1)?;
        s.brought();
        s.publish()?;
        Ok(PrefillReport {
            computed: rows,
            why: "the caller computed them".to_owned(),
            ms: started.elapsed().as_secs_f64() * 1e3,
            ..PrefillReport::default()
        })
    }
}

fn k_dim(l: &LayerLayout) -> usize {
    l.k_dim.into()
}

fn v_dim(l: &LayerLayout) -> usize {
    l.v_dim.into()
}

/// Rows of the pass in backend memory, token by token.
fn upload(backend: &Arc<dyn Backend>, pass: &Pass, x: &[f32], heads: usize, order: Order) -> Result<Rows> {
    let rows = pass.pos().len();
    let dim = x.len() / rows;
    let data = match order {
        Order::Nhd => backend.upload_f32(x)?,
        Order::Hnd => {
            let d = dim / heads;
            let mut by_token = Vec::with_capacity(x.len());
            for (t, h) in (0..rows).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                by_token.extend_from_slice(&x[(h * rows + t) * d..][..d]);
            }
            backend.upload_f32(&by_token)?
        }
    };
    let of = std::iter::once(0..rows as u32).collect();
    Ok(Rows { data, dim: dim as u32, pos: pass.pos().to_vec(), of })
}
