//! `Cache`: sessions over a store. Opens and forgets; finds the prefix another session has computed. `resume.rs` brings
//! sessions back.

use std::sync::Arc;
use std::time::Instant;

use kvasir_core::{Backend, Layout, Mask, Model};
use kvasir_store::{
    BLOCK_TOKENS, BlockKey, Chain, CodecId, Copies, Expect, Forgotten, Lineage, Options, Stats, Store,
    TenantKey,
};
use serde::Serialize;

use crate::Result;
use crate::blocks::{BlockTiles, SharedPrefix};
use crate::cancel::Cancel;
use crate::commit::Owner;
use crate::drive::{self, PASS_ROWS};
use crate::session::{Session, SessionOptions};

/// A store and the backend its sessions live on.
#[derive(Clone)]
pub struct Cache {
    pub(crate) store: Arc<Store<Arc<BlockTiles>>>,
    backend: Arc<dyn Backend>,
}

/// What a prefill did.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PrefillReport {
    /// Tokens whose rows were found.
    pub reused: u32,
    /// Tokens that went through the model.
    pub computed: u32,
    /// Why not more was reused.
    pub why: String,
    /// Bytes of the blocks reused.
    pub bytes: u64,
    /// Wall time.
    pub ms: f64,
}

impl Cache {
    /// Opens or makes a store.
    pub fn open(options: Options, backend: Arc<dyn Backend>) -> Result<Self> {
        Ok(Self { store: Arc::new(Store::open(options)?), backend })
    }

    /// The same store for sessions on another backend. Blocks in memory are shared, so it must be able to read the memory of
    /// this one, as every CPU backend can.
    #[must_use]
    pub fn on(&self, backend: Arc<dyn Backend>) -> Self {
        Self { store: Arc::clone(&self.store), backend }
    }

    /// The store.
    pub fn store(&self) -> &Store<Arc<BlockTiles>> {
        &self.store
    }

    /// State and history of the store.
    pub fn stats(&self) -> Stats {
        self.store.stats()
    }

    /// The prefix that `tokens` leading tokens share under the 32-byte key of a group.
    pub fn shared_prefix(key: &[u8; 32], tokens: u32) -> SharedPrefix {
        SharedPrefix { key: TenantKey::group(key), tokens }
    }

    /// An empty session of `tenant`.
    pub fn session(
        &self,
        tenant: &str,
        share: Option<SharedPrefix>,
        layout: Arc<Layout>,
        options: SessionOptions,
    ) -> Result<Session> {
        let key = self.store.tenant(tenant)?;
        let mut session = Session::new(Arc::clone(&self.backend), layout, options)?;
        let chain = Chain::new(&key, session.identity());
        session.owner = Some(Owner { store: Arc::clone(&self.store), key, share, chain });
        Ok(session)
    }

    /// Removes everything of a tenant from all tiers.
    pub fn forget(&self, tenant: &str) -> Result<Forgotten> {
        Ok(self.store.forget(&self.store.tenant(tenant)?)?)
    }

    /// A block from memory or disk, in the code `held` where it is known, else in a code of the session. Where there is no
    /// such copy, the rows as they were computed.
    pub(crate) fn read_block(
        &self,
        session: &Session,
        chain: &Chain,
        b: usize,
        ids: &[u32],
        held: Option<CodecId>,
    ) -> Result<(CodecId, Arc<BlockTiles>, u64), String> {
        let mut last = String::from("not found");
        let codes = match held {
            Some(codec) => vec![codec],
            None => session.found_codes(),
        };
        let mut wanted: Vec<Copies> =
            codes.into_iter().filter(|c| !c.is_exact()).map(Copies::Coded).collect();
        wanted.push(Copies::Exact);
        let name = &chain.names()[b];
        for copies in wanted {
            // Memory may hold exact rows where the disk holds the coded ones that were committed.
            let on_disk = || self.store.disk().is_some_and(|d| d.has_coded(name, copies.first()));
            if let Some((codec, tiles)) = self.store.mem().get(name, copies)
                && (codec == copies.first() || !on_disk())
            {
                return Ok((codec, Arc::clone(&tiles), tiles.bytes()));
            }
            let (Some(disk), Some(expect)) = (self.store.disk(), Expect::block(chain, b, ids, copies)) else {
                continue;
            };
            match disk.get(&expect) {
                Ok(block) => match session.block_from(block.codec, block.parts()) {
                    Ok(Some(tiles)) => {
                        let key = BlockKey { name: *name, codec: block.codec };
                        self.store.mem().put(chain.owners()[b], key, tiles.bytes(), Arc::clone(&tiles));
                        return Ok((block.codec, tiles, block.stored_len()));
                    }
                    Ok(None) => "its parts do not fit the layout".clone_into(&mut last),
                    Err(e) => last = e.to_string(),
                },
                Err(miss) => last = miss.to_string(),
            }
        }
        Err(last)
    }

    /// Takes the longest prefix of `ids` that sessions of the same owner have computed. At least one token is left to compute.
    fn reuse(&self, session: &mut Session, ids: &[u32]) -> Result<(u64, String)> {
        let full = ids.len().saturating_sub(1) / BLOCK_TOKENS;
        if full == 0 {
            return Ok((0, format!("a prefix of whole blocks is at least {} tokens", BLOCK_TOKENS + 1)));
        }
        let owner = session.owner.clone().expect("checked by the caller");
        let derived = Lineage::Derived(session.options.recipe.hash());
        // Exact rows serve every recipe. Rows of the same recipe do, too: exact as far as the first pass went.
        let first_pass = PASS_ROWS / BLOCK_TOKENS;
        let mut lineages = vec![vec![Lineage::Exact; full]];
        if session.stack.is_lossy() {
            lineages.push((0..full).map(|b| if b < first_pass { Lineage::Exact } else { derived }).collect());
        }
        let codecs = session.found_codes();
        let mut best: Option<(usize, Chain)> = None;
        for lineage in lineages {
            let mut chain = Chain::new(&owner.key, session.identity());
            for (b, lineage) in lineage.into_iter().enumerate() {
                match &owner.share {
                    Some(s) if (b + 1) * BLOCK_TOKENS <= s.tokens as usize => chain.set_key(&s.key),
                    _ => chain.set_key(&owner.key),
                }
                chain.push(lineage, &ids[b * BLOCK_TOKENS..(b + 1) * BLOCK_TOKENS])?;
            }
            let coded = codecs.iter().map(|c| self.store.has(&chain, Copies::Coded(*c))).max();
            let found = self.store.has(&chain, Copies::Exact).max(coded.unwrap_or(0));
            if best.as_ref().is_none_or(|b| found > b.0) {
                best = Some((found, chain));
            }
        }
        let Some((found, mut chain)) = best else { return Ok((0, "not found".to_owned())) };
        let (mut bytes, mut why) =
            (0, if found == full { "the rest is new" } else { "not found" }.to_owned());
        let mut taken = 0;
        for b in 0..found {
            match self.read_block(session, &chain, b, ids, None) {
                Ok((codec, tiles, n)) if session.take_block(b, codec, &tiles)? => {
                    bytes += n;
                    taken += 1;
                }
                Ok(_) => {
                    why = format!("block {b}: stored in another code");
                    break;
                }
                Err(miss) => {
                    why = format!("block {b}: {miss}");
                    break;
                }
            }
        }
        let exact = chain.lineages()[..taken].iter().take_while(|l| **l == Lineage::Exact).count();
        session.exact_to = (exact * BLOCK_TOKENS) as u32;
        session.ids = ids[..taken * BLOCK_TOKENS].to_vec();
        chain.truncate(taken);
        if let Some(o) = &mut session.owner {
            o.chain = chain;
        }
        if taken > 0 {
            session.wake_found()?;
        }
        Ok((bytes, why))
    }
}

impl Session {
    /// Computes `ids` behind what the session holds. An empty session first takes the longest prefix that is stored for its
    /// owner. Full blocks are offered to other sessions at once. On error the session is as before.
    pub fn prefill(&mut self, model: &dyn Model, ids: &[u32], cancel: &Cancel) -> Result<PrefillReport> {
        self.whole()?;
        let started = Instant::now();
        kvasir_core::check::at_least("prefill.ids", ids.len(), 1)?;
        self.fits_in_passes(ids.len())?;
        cancel.expect(ids.len());
        let before = self.point();
        match self.reuse_and_compute(model, ids, cancel) {
            Ok(report) => Ok(PrefillReport { ms: started.elapsed().as_secs_f64() * 1e3, ..report }),
            Err(e) => {
                self.back_to(before)?;
                Err(e)
            }
        }
    }

    fn reuse_and_compute(
        &mut self,
        model: &dyn Model,
        ids: &[u32],
        cancel: &Cancel,
    ) -> Result<PrefillReport> {
        let mut report =
            PrefillReport { why: "the session was not empty".to_owned(), ..PrefillReport::default() };
        // Rows that were computed with sight of the past alone are others than those of a full mask.
        let alike = self.is_empty() && self.private.is_none() && self.stack.mask == Mask::Causal;
        if let (true, Some(owner)) = (alike, self.owner.clone()) {
            let cache = Cache { store: owner.store, backend: Arc::clone(&self.backend) };
            (report.bytes, report.why) = cache.reuse(self, ids)?;
            report.reused = self.seen;
            cancel.advance(report.reused as usize);
        }
        let rest = &ids[report.reused as usize..];
        drive::prefill(model, self, rest, cancel)?;
        report.computed = rest.len() as u32;
        self.publish()?;
        Ok(report)
    }
}
