//! The seam to the file system: every byte of the store goes through [`Fs`], so that a test can stop, fail or count any
//! operation. [`OsFs`] is the real one.
//!
//! Rules the real one keeps and a substitute must keep too: files and folders are readable by their owner only; a temporary
//! file is locked while its writer lives, so that another process can tell a stray from work in progress (a process id
//! would not do: it is reused, and means nothing across containers that share a folder).

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// A file being written, at its end only.
pub trait FileWrite: Send {
    /// Append all of `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Return when every byte written is on the medium.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file being read.
pub trait FileRead: Send + Sync {
    /// Bytes in the file.
    fn size(&self) -> io::Result<u64>;
    /// Fill `buf` from `offset`. [`io::ErrorKind::UnexpectedEof`] when the file is shorter.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// What the store asks of a file system.
pub trait Fs: Send + Sync {
    /// Make `path` and its parents, for the owner only. Existing folders are fine.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Make a new file for the owner only and lock it until it is dropped. [`io::ErrorKind::AlreadyExists`] if it is there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn FileWrite>>;
    /// Open for reading.
    fn open(&self, path: &Path) -> io::Result<Box<dyn FileRead>>;
    /// Move, replacing what is there, atomically.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Return when names made, moved or removed in this folder are on the medium.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Delete a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Delete an empty folder.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Delete a temporary file unless its writer still lives. Says whether it did.
    fn remove_stray(&self, path: &Path) -> io::Result<bool>;
    /// Names in a folder, in no order.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Time of the last change in ms since 1970.
    fn modified_ms(&self, path: &Path) -> io::Result<u64>;
    /// Wait for the exclusive lock on `path` (made if missing), held until the value is dropped.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send>>;
}

/// The file system of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsFs;

struct OsFile(File);

impl FileWrite for OsFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_all()
    }
}

impl FileRead for OsFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    #[cfg(unix)]
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.0, buf, offset)
    }

    #[cfg(windows)]
    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(&self.0, buf, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    offset += n as u64;
                    buf = &mut buf[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn owner_only(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

/// Some network file systems have no locks; there strays are never removed, which is the safe side.
fn locked(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(false),
        Err(e) => Err(e),
    }
}

impl Fs for OsFs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn FileWrite>> {
        loop {
            let file = owner_only(OpenOptions::new().write(true).create_new(true)).open(path)?;
            locked(file.lock())?;
            // Between the two lines above a cleaner may have taken the new file for a stray. It removes under the lock,
            // so from here on the file is either gone or safe.
            if path.exists() {
                return Ok(Box::new(OsFile(file)));
            }
        }
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FileRead>> {
        Ok(Box::new(OsFile(File::open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    #[cfg(unix)]
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    /// Windows has no handle to sync a folder through; NTFS journals the rename.
    #[cfg(not(unix))]
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }

    fn remove_stray(&self, path: &Path) -> io::Result<bool> {
        let file = OpenOptions::new().write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => std::fs::remove_file(path).map(|()| true),
            Err(_) => Ok(false),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        // A name that is not UTF-8 is none of ours.
        let names = std::fs::read_dir(path)?.map(|e| Ok(e?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    fn modified_ms(&self, path: &Path) -> io::Result<u64> {
        let since = std::fs::metadata(path)?.modified()?.duration_since(UNIX_EPOCH);
        Ok(since.map_or(0, |d| d.as_millis() as u64))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send>> {
        let file = owner_only(OpenOptions::new().write(true).create(true).truncate(false)).open(path)?;
        locked(file.lock())?;
        Ok(Box::new(file))
    }
}

/// Write `dir/name` so that it is there in full or not at all, and stays: a temporary file, sync, rename, sync of the folder.
/// After an error nothing of it remains, but for one case: if only the last sync failed, the file is in its place and what
/// is unknown is whether a power cut would take it away.
pub(crate) fn write_durably<T, E: From<crate::Error>>(
    fs: &dyn Fs,
    dir: &Path,
    name: &str,
    wanted_bytes: u64,
    fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<T, E>,
) -> Result<T, E> {
    let temporary = dir.join(format!("{}{TEMPORARY}", crate::name::hex(&crate::name::random_bytes::<16>()?)));
    let failed = |op, path: &Path, e| crate::Error::io(op, path, wanted_bytes, e);
    let mut file = match fs.create(&temporary) {
        // The folder is not there yet, or another process has just forgotten its owner.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs.create_dir(dir).map_err(|e| failed("create_dir", dir, e))?;
            if let Some(up) = dir.parent() {
                fs.sync_dir(up).map_err(|e| failed("sync_dir", up, e))?;
            }
            fs.create(&temporary)
        }
        other => other,
    }
    .map_err(|e| failed("create", &temporary, e))?;
    let written = fill(&mut |bytes| file.write(bytes)).and_then(|out| {
        file.sync().map_err(|e| failed("sync", &temporary, e))?;
        let to = dir.join(name);
        fs.rename(&temporary, &to).map_err(|e| failed("rename", &to, e))?;
        Ok(out)
    });
    // The lock goes with the file, after the rename: no cleaner can take it for a stray before.
    drop(file);
    match written {
        Ok(out) => {
            fs.sync_dir(dir).map_err(|e| failed("sync_dir", dir, e))?;
            Ok(out)
        }
        Err(e) => {
            // Should this fail too, the next process to open the store removes the stray.
            if let Err(e) = fs.remove(&temporary) {
                tracing::warn!(path = %temporary.display(), error = %e, "a temporary file stays behind");
            }
            Err(e)
        }
    }
}

/// Ending of temporary files.
pub(crate) const TEMPORARY: &str = ".tmp";

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_writer_keeps_its_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tmp");
        let file = OsFs.create(&path).unwrap();
        assert!(!OsFs.remove_stray(&path).unwrap());
        drop(file);
        assert!(OsFs.remove_stray(&path).unwrap());
        assert!(!path.exists());
    }

    #[cfg(unix)]
    #[test]
    fn files_are_for_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path().join("d"), dir.path().join("d/f"));
        OsFs.create_dir(&folder).unwrap();
        OsFs.create(&file).unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
    }

    #[test]
    fn reading_past_the_end_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        OsFs.create(&path).unwrap().write(b"abc").unwrap();
        let file = OsFs.open(&path).unwrap();
        let mut two = [0; 2];
        file.read_at(1, &mut two).unwrap();
        assert_eq!((file.size().unwrap(), &two), (3, b"bc"));
        assert_eq!(file.read_at(2, &mut two).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
