//! The real file system with a hook in front of and behind every operation that changes something. The hook may fail the
//! operation, or stop the process for good.

use std::any::Any;
use std::io;
use std::path::Path;
use std::sync::Arc;

use kvasir_store::{FileRead, FileWrite, Fs, OsFs};

/// Called with the name of the point. An error fails the operation; for points behind an operation too.
pub(crate) type Hook = Arc<dyn Fn(&str) -> io::Result<()> + Send + Sync>;

pub(crate) struct Hooked(pub(crate) Hook);

struct HookedFile(Box<dyn FileWrite>, Hook);

/// What kind of file an operation is about.
fn kind(path: &Path) -> &str {
    path.extension().and_then(|e| e.to_str()).unwrap_or("folder")
}

impl FileWrite for HookedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let half = bytes.len() / 2;
        (self.1)("write begins")?;
        self.0.write(&bytes[..half])?;
        (self.1)("write is half done")?;
        self.0.write(&bytes[half..])?;
        (self.1)("write is done")
    }

    fn sync(&mut self) -> io::Result<()> {
        (self.1)("sync begins")?;
        self.0.sync()?;
        (self.1)("sync is done")
    }
}

impl Fs for Hooked {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        (self.0)("create_dir begins")?;
        OsFs.create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn FileWrite>> {
        (self.0)("create begins")?;
        let file = OsFs.create(path)?;
        // A failure here leaves the file: as if the process had died right after making it.
        (self.0)("create is done")?;
        Ok(Box::new(HookedFile(file, Arc::clone(&self.0))))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FileRead>> {
        OsFs.open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        (self.0)(&format!("rename to {} begins", kind(to)))?;
        OsFs.rename(from, to)?;
        (self.0)(&format!("rename to {} is done", kind(to)))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        (self.0)("sync_dir begins")?;
        OsFs.sync_dir(path)?;
        (self.0)("sync_dir is done")
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        (self.0)(&format!("remove of {} begins", kind(path)))?;
        OsFs.remove(path)?;
        (self.0)(&format!("remove of {} is done", kind(path)))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        OsFs.remove_dir(path)
    }

    fn remove_stray(&self, path: &Path) -> io::Result<bool> {
        OsFs.remove_stray(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        OsFs.list(path)
    }

    fn modified_ms(&self, path: &Path) -> io::Result<u64> {
        OsFs.modified_ms(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send>> {
        OsFs.lock(path)
    }
}
