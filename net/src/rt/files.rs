//! The process' table of open files, which every connection has a place in.

use std::io;
use std::os::fd::AsFd;

use rustix::process::{Resource, getrlimit};

/// Places that are made at most: half a megabyte of the kernel's.
const MOST_PLACES: u64 = 1 << 16;

/// Makes the places for as many open files as the limit allows, at most 65,536, and says how many.
///
/// The kernel doubles the table when it is full. While several threads share it, each time whoever
/// opened one file too many stands still for a grace period of the kernel's, some milliseconds; if
/// that is an executor that takes a burst of connections, so does everybody whom it serves
/// (`expand_fdtable` in Linux' `fs/file.c`). To be called early, once the limit is what it will be.
///
/// # Errors
/// No file can be opened.
pub fn reserve_files() -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(MOST_PLACES);
    let places = limit.min(MOST_PLACES);
    let Some(last) = places.checked_sub(1).and_then(|last| i32::try_from(last).ok()) else {
        return Ok(0);
    };
    let any = std::fs::File::open("/dev/null")?;
    // A table never gets smaller.
    drop(rustix::io::fcntl_dupfd_cloexec(any.as_fd(), last)?);
    Ok(places)
}

#[cfg(test)]
mod tests {
    // A failed unwrap is a failed test.
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn places() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        line.trim().parse().unwrap()
    }

    #[test]
    fn the_table_has_room_for_all_files_that_may_be_opened() {
        let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let reserved = reserve_files().unwrap();
        assert!(reserved > 256, "{reserved}");
        assert!(places() >= reserved, "{} of {reserved}", places());
        assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before, "nothing is open");
    }
}
