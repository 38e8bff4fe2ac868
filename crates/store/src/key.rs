//! The store's secret: 32 random bytes in `dir/secret`, mode 0600, made on first use.
//!
//! Whoever has this file and a tenant's id can name that tenant's blocks. Without it the store's files are of no use to
//! anybody: names no longer come out, and everything is a miss.

use std::io;
use std::path::Path;

use crate::fs::write_durably;
use crate::name::random_bytes;
use crate::{Error, Fs, Result};

const SECRET: &str = "secret";
const LOCK: &str = "secret.lock";

/// The secret of the store in `dir`, made if there is none. Processes that start at once agree on one.
pub(crate) fn secret(fs: &dyn Fs, dir: &Path) -> Result<[u8; 32]> {
    if let Some(key) = read(fs, dir)? {
        return Ok(key);
    }
    let lock = dir.join(LOCK);
    let held = fs.lock(&lock).map_err(|e| Error::io("lock", &lock, 0, e))?;
    // Another process may have made it while this one waited.
    if let Some(key) = read(fs, dir)? {
        return Ok(key);
    }
    let key = random_bytes()?;
    write_durably(fs, dir, SECRET, 32, |out| {
        out(&key).map_err(|e| Error::io("write", &dir.join(SECRET), 32, e))
    })?;
    drop(held);
    Ok(key)
}

fn read(fs: &dyn Fs, dir: &Path) -> Result<Option<[u8; 32]>> {
    let path = dir.join(SECRET);
    let file = match fs.open(&path) {
        Ok(f) => f,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", &path, 0, e)),
    };
    let len = file.size().map_err(|e| Error::io("size", &path, 0, e))?;
    if len != 32 {
        let reason = format!("expected 32 bytes, got {len}");
        return Err(Error::Malformed { path: path.display().to_string(), reason });
    }
    let mut key = [0; 32];
    file.read_at(0, &mut key).map_err(|e| Error::io("read", &path, 0, e))?;
    Ok(Some(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OsFs;

    #[test]
    fn threads_that_start_at_once_agree_on_one_secret() {
        let dir = tempfile::tempdir().unwrap();
        let keys: Vec<_> = std::thread::scope(|s| {
            let jobs: Vec<_> = (0..8).map(|_| s.spawn(|| secret(&OsFs, dir.path()).unwrap())).collect();
            jobs.into_iter().map(|j| j.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|k| *k == keys[0]) && keys[0] != [0; 32]);
        let mut names = OsFs.list(dir.path()).unwrap();
        names.sort();
        assert_eq!(names, [SECRET, LOCK]);
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        secret(&OsFs, dir.path()).unwrap();
        let mode = std::fs::metadata(dir.path().join(SECRET)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_secret_is_an_error_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(SECRET), [1; 31]).unwrap();
        assert_eq!(secret(&OsFs, dir.path()).unwrap_err().code(), "Malformed");
        assert_eq!(std::fs::read(dir.path().join(SECRET)).unwrap(), [1; 31]);
    }
}
