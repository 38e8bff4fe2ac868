//! `Deferred`: the backend that waits as long as it may. It catches code that looks at results before it read them, code
//! that reads too often, and code that counts on `submit` to run or to fail at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvasir_core::{Backend, BackendInfo, Buf, Call, Result, Run};

/// Queues every call; `read` runs the queue in order on the inner backend. Outputs are NaN until then.
pub struct Deferred {
    inner: Arc<dyn Backend>,
    info: BackendInfo,
    queue: Mutex<Vec<Call>>,
    submits: AtomicU64,
    reads: AtomicU64,
}

impl Deferred {
    /// A deferred backend that runs its queue on `inner`.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        let info = BackendInfo { kind: "deferred".into(), ..inner.info().clone() };
        let queue = Mutex::new(Vec::new());
        Self { inner, info, queue, submits: AtomicU64::new(0), reads: AtomicU64::new(0) }
    }

    /// Reads so far.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::SeqCst)
    }

    /// Calls submitted so far.
    pub fn submits(&self) -> u64 {
        self.submits.load(Ordering::SeqCst)
    }

    /// Calls that wait for a read.
    pub fn waiting(&self) -> usize {
        self.queue().len()
    }

    /// Every f32 of the buffer is NaN now, before the queue runs.
    pub fn peek_is_nan(&self, buf: &Buf) -> bool {
        let x = self.inner.read_f32(buf).expect("peek: the inner backend reads");
        !x.is_empty() && x.iter().all(|x| x.is_nan())
    }

    fn queue(&self) -> MutexGuard<'_, Vec<Call>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Deferred {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buf> {
        self.inner.alloc(bytes)
    }

    fn submit(&self, call: Call) -> Result<()> {
        self.submits.fetch_add(1, Ordering::SeqCst);
        let mut queue = self.queue();
        for out in call.pure_outputs() {
            // An output that a waiting call, or this very call, still has to read keeps its bytes.
            let mine = bufs(&call).iter().filter(|b| b.overlaps(out)).count();
            let waited_for = queue.iter().any(|c| bufs(c).iter().any(|b| b.overlaps(out)));
            if mine <= 1 && !waited_for && out.bytes() > 0 {
                // All ones is NaN in f32, f16 and bf16, and nonsense as an index.
                let data = vec![0xFF; out.bytes()].into();
                self.inner.submit(Call::Write { dst: out.clone(), data })?;
            }
        }
        queue.push(call);
        Ok(())
    }

    fn read(&self, src: &Buf, dst: &mut [u8]) -> Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        // Taken first: after an error the rest of the queue is dropped, as a device would poison its stream.
        let calls = std::mem::take(&mut *self.queue());
        for call in calls {
            self.inner.submit(call)?;
        }
        self.inner.read(src, dst)
    }
}

fn run_bufs<'a>(run: &'a Run, all: &mut Vec<&'a Buf>) {
    all.extend(run.tiles.iter().map(|t| &t.codes));
    all.extend(run.meta.bias.iter().chain(run.meta.scale.iter().flatten()));
    all.extend(run.meta.cols.iter().map(|c| &c.1));
}

/// Every buffer that a call names.
fn bufs(call: &Call) -> Vec<&Buf> {
    match call {
        Call::Write { dst, .. } | Call::Fill { dst, .. } => vec![dst],
        Call::Copy { src, dst }
        | Call::Gather { src, dst, .. }
        | Call::Scatter { src, dst, .. }
        | Call::CompactColumn { src, dst, .. } => vec![src, dst],
        Call::Embed { table, out, .. } => vec![&table.data, out],
        Call::RmsNorm { x, weight, out, .. } => vec![x, weight, out],
        Call::MatMul { x, w, out, .. } => vec![x, &w.data, out],
        Call::Activate { a, b, out, .. } | Call::RowDistance { a, b, out, .. } => vec![a, b, out],
        Call::Add { x, y } => vec![x, y],
        Call::Append { k, v, writes, .. } => {
            [k, v].into_iter().chain(writes.iter().map(|w| &w.tile)).collect()
        }
        Call::Attend(a) => {
            let mut all = vec![&a.q, &a.out];
            all.extend(a.lse.as_ref());
            for run in a.seqs.iter().flat_map(|s| s.heads.iter().flatten()) {
                run_bufs(run, &mut all);
            }
            all.extend(a.columns.iter().flat_map(|c| c.targets.iter().flatten().flatten().flatten()));
            all
        }
        Call::Seal { tiles, .. } => tiles.iter().flat_map(|t| [&t.0, &t.1]).collect(),
        Call::Decode { tile, k_out, v_out, .. } => vec![tile, k_out, v_out],
        Call::Compact { src, dst, .. } => src.iter().map(|t| &t.codes).chain(dst).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_core::Error;

    /// Bytes behind a lock; runs `Write`, `Fill`, `Copy` and `Add` at once.
    struct Bytes(BackendInfo);

    type Mem = Mutex<Vec<u8>>;

    fn bytes_of(b: &Buf) -> Vec<u8> {
        b.mem::<Mem>().expect("mine").lock().expect("lock")[b.offset()..][..b.bytes()].to_vec()
    }

    fn put(b: &Buf, data: &[u8]) -> Result<()> {
        if data.len() != b.bytes() {
            return Err(Error::invalid("write", b.bytes(), data.len()));
        }
        b.mem::<Mem>().expect("mine").lock().expect("lock")[b.offset()..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn f32s(b: &Buf) -> Vec<f32> {
        bytes_of(b).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    impl Backend for Bytes {
        fn info(&self) -> &BackendInfo {
            &self.0
        }
        fn alloc(&self, bytes: usize) -> Result<Buf> {
            Ok(Buf::new(Arc::new(Mem::new(vec![0; bytes])), bytes))
        }
        fn submit(&self, call: Call) -> Result<()> {
            match call {
                Call::Write { dst, data } => put(&dst, &data),
                Call::Fill { dst, value } => put(&dst, &value.to_le_bytes().repeat(dst.bytes() / 4)),
                Call::Copy { src, dst } => put(&dst, &bytes_of(&src)),
                Call::Add { x, y } => {
                    let sum = f32s(&x)
                        .iter()
                        .zip(f32s(&y))
                        .flat_map(|(a, b)| (a + b).to_le_bytes())
                        .collect::<Vec<_>>();
                    put(&x, &sum)
                }
                _ => Err(Error::unsupported("call")),
            }
        }
        fn read(&self, src: &Buf, dst: &mut [u8]) -> Result<()> {
            dst.copy_from_slice(&bytes_of(src)[..dst.len()]);
            Ok(())
        }
    }

    fn deferred() -> Deferred {
        Deferred::new(Arc::new(Bytes(BackendInfo {
            kind: "bytes".into(),
            isa: String::new(),
            features: Vec::new(),
            threads: 1,
            device: String::new(),
        })))
    }

    #[test]
    fn outputs_are_nan_until_they_are_read() {
        let d = deferred();
        let (a, b) = (d.upload_f32(&[1.0, 2.0]).expect("upload"), d.alloc(8).expect("alloc"));
        d.submit(Call::Copy { src: a.clone(), dst: b.clone() }).expect("submit");
        assert!(d.peek_is_nan(&b));
        assert!(d.peek_is_nan(&a), "the upload waits too");
        assert_eq!((d.reads(), d.waiting()), (0, 2));
        assert_eq!(d.read_f32(&b).expect("read"), [1.0, 2.0]);
        assert_eq!((d.reads(), d.waiting(), d.submits()), (1, 0, 2));
        assert!(!d.peek_is_nan(&b));
    }

    #[test]
    fn bytes_that_a_waiting_call_needs_are_left() {
        let d = deferred();
        let (x, y) = (d.upload_f32(&[1.0]).expect("x"), d.alloc(4).expect("y"));
        d.read_f32(&x).expect("settle");
        d.submit(Call::Copy { src: x.clone(), dst: y.clone() }).expect("copy");
        d.submit(Call::Fill { dst: x.clone(), value: 9.0 }).expect("fill");
        assert!(!d.peek_is_nan(&x), "the copy has not run yet");
        assert_eq!(d.read_f32(&y).expect("read"), [1.0]);
        assert_eq!(d.read_f32(&x).expect("read"), [9.0]);
        d.submit(Call::Add { x: x.clone(), y }).expect("add");
        assert!(!d.peek_is_nan(&x), "add reads what it writes");
        assert_eq!(d.read_f32(&x).expect("read"), [10.0]);
    }

    #[test]
    fn trouble_comes_with_the_next_read() {
        let d = deferred();
        let (a, b) = (d.alloc(4).expect("a"), d.alloc(8).expect("b"));
        d.submit(Call::Copy { src: a.clone(), dst: b.clone() }).expect("submit never waits");
        assert!(matches!(d.read_f32(&b), Err(Error::Invalid { .. })));
        d.submit(Call::Fill { dst: b.clone(), value: 1.0 }).expect("it goes on");
        assert_eq!(d.read_f32(&b).expect("read"), [1.0, 1.0]);
    }
}
