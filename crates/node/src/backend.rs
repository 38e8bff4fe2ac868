//! CPU backends of this process: models with the same threads and kernels share one.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvasir_core::Backend;
use kvasir_cpu::{Cpu, CpuOptions, Isa};
use serde::Deserialize;

use crate::error::Result;

/// Kernels by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Path {
    #[default]
    Auto,
    Scalar,
    Avx2,
}

impl From<Path> for Isa {
    fn from(path: Path) -> Self {
        match path {
            Path::Auto => Self::Auto,
            Path::Scalar => Self::Scalar,
            Path::Avx2 => Self::Avx2,
        }
    }
}

type Known = Vec<(Option<usize>, Path, Weak<Cpu>)>;
static CPUS: Mutex<Known> = Mutex::new(Vec::new());

/// The backend with these threads (by default one per core) and kernels.
pub(crate) fn cpu(threads: Option<usize>, path: Path) -> Result<Arc<Cpu>> {
    let mut cpus = CPUS.lock().unwrap_or_else(PoisonError::into_inner);
    cpus.retain(|(_, _, cpu)| cpu.strong_count() > 0);
    let known = cpus.iter().find(|(t, p, _)| (*t, *p) == (threads, path));
    if let Some(cpu) = known.and_then(|(_, _, cpu)| cpu.upgrade()) {
        return Ok(cpu);
    }
    let cpu = Arc::new(Cpu::new(CpuOptions { isa: path.into(), threads })?);
    cpus.push((threads, path, Arc::downgrade(&cpu)));
    Ok(cpu)
}

/// The same as the trait the engine takes.
pub(crate) fn backend(threads: Option<usize>, path: Path) -> Result<Arc<dyn Backend>> {
    Ok(cpu(threads, path)?)
}

/// Kernels this machine can run.
pub(crate) fn available() -> Vec<&'static str> {
    let runs = |isa| Cpu::new(CpuOptions { isa, threads: Some(1) }).is_ok();
    [("scalar", Isa::Scalar), ("avx2", Isa::Avx2)]
        .into_iter()
        .filter_map(|(name, isa)| runs(isa).then_some(name))
        .collect()
}
