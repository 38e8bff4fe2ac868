//! `Cpu`: the backend object.

use std::sync::Arc;

use kvasir_core::{Backend, BackendInfo, Buf, Call, Error, Result};

use crate::arch::{self, Kernels};
use crate::calls;
use crate::mem::{self, Mem};
use crate::pool::Pool;
use crate::rope::RopeCache;

/// Which kernels to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isa {
    /// The best this machine has.
    #[default]
    Auto,
    /// Portable code: the reference.
    Scalar,
    /// AVX2, FMA and F16C; an error where the machine lacks them.
    Avx2,
}

/// Options of the CPU backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Kernels.
    pub isa: Isa,
    /// Threads, at least 1; by default as many as this process may use.
    pub threads: Option<usize>,
}

/// The CPU backend.
pub struct Cpu {
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: Pool,
    pub(crate) ropes: RopeCache,
    info: BackendInfo,
}

impl Cpu {
    /// Detects the machine and starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let threads = match options.threads {
            Some(n @ 1..=1024) => n,
            Some(n) => return Err(Error::invalid("cpu.threads", "1 to 1024", n)),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let kernels = match options.isa {
            Isa::Scalar => &arch::all::KERNELS,
            Isa::Auto => arch::best().unwrap_or(&arch::all::KERNELS),
            Isa::Avx2 => arch::avx2()
                .ok_or_else(|| Error::unsupported("isa avx2: this machine lacks AVX2, FMA or F16C"))?,
        };
        let pool = Pool::new(threads)?;
        let info = BackendInfo {
            kind: "cpu".into(),
            isa: kernels.name.into(),
            features: arch::features(),
            threads: pool.threads(),
            device: device(),
        };
        Ok(Self { kernels, pool, ropes: RopeCache::default(), info })
    }
}

/// Name of the processor.
fn device() -> String {
    let named = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    named.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

impl Backend for Cpu {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buf> {
        Ok(Buf::new(Arc::new(Mem::zeroed(bytes)?), bytes))
    }

    fn submit(&self, call: Call) -> Result<()> {
        calls::run(self, &call)
    }

    fn read(&self, src: &Buf, dst: &mut [u8]) -> Result<()> {
        let all = mem::bytes("read.src", src)?;
        let from = all.get(..dst.len()).ok_or_else(|| {
            Error::invalid("read.dst", format_args!("at most {} bytes", all.len()), dst.len())
        })?;
        dst.copy_from_slice(from);
        Ok(())
    }
}
