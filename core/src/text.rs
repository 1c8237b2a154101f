//! Immutable text and bytes behind one pointer, shared by counting. An `Arc<str>` is two words and
//! has a count of weak owners: in rows, of which an executor holds millions, that is a third of
//! what a short text takes.
//!
//! All of it rests on [`Bytes`]: one allocation of a [`Header`] with the bytes right behind it.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::{self, AtomicPtr};

use crate::owners::Owners;
#[cfg(test)]
use crate::owners::tally;

/// What precedes the bytes.
#[repr(C)]
struct Header {
    owners: Owners,
    len: u32,
}

/// Immutable bytes, shared.
struct Bytes(NonNull<Header>);

// SAFETY: the bytes never change, and the owners are counted atomically.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    fn layout(len: usize) -> Layout {
        match Layout::new::<Header>()
            .extend(Layout::array::<u8>(len).unwrap_or(Layout::new::<u8>()))
        {
            Ok((layout, _)) => layout,
            Err(_) => Layout::new::<Header>(),
        }
    }

    /// # Panics
    /// Beyond 4 GiB, four times what Postgres takes for a value.
    fn new(bytes: &[u8]) -> Bytes {
        let len = bytes.len();
        assert!(u32::try_from(len).is_ok(), "{len} bytes are no value of a database");
        let layout = Bytes::layout(len);
        // SAFETY: the layout is that of a header and `len` bytes, hence not empty; both are written
        // before anybody reads them, and lie in one allocation.
        unsafe {
            let Some(at) = NonNull::new(alloc(layout).cast::<Header>()) else {
                handle_alloc_error(layout)
            };
            at.write(Header { owners: Owners::one(), len: len as u32 });
            ptr::copy_nonoverlapping(bytes.as_ptr(), at.add(1).cast::<u8>().as_ptr(), len);
            Bytes(at)
        }
    }

    fn header(&self) -> &Header {
        // SAFETY: an owner keeps the allocation alive, and nobody writes but to the count.
        unsafe { self.0.as_ref() }
    }

    fn get(&self) -> &[u8] {
        let len = self.header().len as usize;
        // SAFETY: `new` wrote `len` bytes behind the header, in the same allocation.
        unsafe { std::slice::from_raw_parts(self.0.add(1).cast::<u8>().as_ptr(), len) }
    }
}

impl Clone for Bytes {
    fn clone(&self) -> Bytes {
        self.header().owners.join();
        Bytes(self.0)
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        #[cfg(test)]
        tally::text();
        if !self.header().owners.leave() {
            return;
        }
        let layout = Bytes::layout(self.header().len as usize);
        // SAFETY: this was the last owner; `new` allocated with the same layout.
        unsafe { dealloc(self.0.as_ptr().cast::<u8>(), layout) }
    }
}

/// Immutable text, shared: one pointer. Compares and hashes as `str` does.
#[derive(Clone)]
pub struct Text(Bytes);

impl Text {
    /// The text.
    pub fn as_str(&self) -> &str {
        // SAFETY: made of a `str`, and never changed.
        unsafe { std::str::from_utf8_unchecked(self.0.get()) }
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl Borrow<str> for Text {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Text {
        Text(Bytes::new(text.as_bytes()))
    }
}

impl From<String> for Text {
    fn from(text: String) -> Text {
        Text::from(text.as_str())
    }
}

impl PartialEq for Text {
    fn eq(&self, o: &Text) -> bool {
        self.0.0 == o.0.0 || self.as_str() == o.as_str()
    }
}
impl Eq for Text {}
impl PartialOrd for Text {
    fn partial_cmp(&self, o: &Text) -> Option<Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Text {
    fn cmp(&self, o: &Text) -> Ordering {
        if self.0.0 == o.0.0 { Ordering::Equal } else { self.as_str().cmp(o.as_str()) }
    }
}
impl Hash for Text {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.as_str().hash(h);
    }
}
impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}
impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Bytes that are made at most once, when somebody first wants them: one pointer.
#[derive(Default)]
pub struct Lazy(AtomicPtr<Header>);

impl Lazy {
    /// The bytes, if they were made.
    pub fn get(&self) -> Option<&[u8]> {
        let at = NonNull::new(self.0.load(atomic::Ordering::Acquire))?;
        // SAFETY: a pointer that is here is an owner of a `Bytes`, stays here until `self` is
        // dropped, and so does what it points to; `len` bytes lie behind the header.
        unsafe {
            let len = at.as_ref().len as usize;
            Some(std::slice::from_raw_parts(at.add(1).cast::<u8>().as_ptr(), len))
        }
    }

    /// The bytes; these, unless others were here first.
    pub fn get_or_set(&self, bytes: &[u8]) -> &[u8] {
        if self.get().is_none() {
            let made = std::mem::ManuallyDrop::new(Bytes::new(bytes));
            let (set, read) = (atomic::Ordering::AcqRel, atomic::Ordering::Acquire);
            let at = made.0.as_ptr();
            if self.0.compare_exchange(ptr::null_mut(), at, set, read).is_err() {
                drop(std::mem::ManuallyDrop::into_inner(made));
            }
        }
        self.get().unwrap_or_default()
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        if let Some(at) = NonNull::new(*self.0.get_mut()) {
            // Its owner was here.
            drop(Bytes(at));
        }
    }
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.get().map(String::from_utf8_lossy), f)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::hash_map::DefaultHasher;

    use super::*;

    #[test]
    fn text_behaves_as_str() {
        let hash = |h: &dyn Fn(&mut DefaultHasher)| {
            let mut hasher = DefaultHasher::new();
            h(&mut hasher);
            hasher.finish()
        };
        let all = ["", "a", "ab", "b", "é", "😀", "a longer text of more than a word or two"];
        for a in all {
            let text = Text::from(a);
            assert_eq!(
                (&*text, text.to_string(), format!("{text:?}")),
                (a, a.into(), format!("{a:?}"))
            );
            assert_eq!(hash(&|h| text.hash(h)), hash(&|h| a.hash(h)));
            for b in all {
                assert_eq!(text.cmp(&Text::from(b)), a.cmp(b));
                assert_eq!(text == Text::from(b.to_owned()), a == b);
            }
        }
        assert_eq!(size_of::<Option<Text>>(), size_of::<usize>());
    }

    #[test]
    fn text_is_shared_between_threads_and_freed_by_the_last_owner() {
        let text = Text::from("shared");
        std::thread::scope(|s| {
            for _ in 0..4 {
                let mine = text.clone();
                s.spawn(move || {
                    for _ in 0..1_000 {
                        assert_eq!(&*mine.clone(), "shared");
                    }
                });
            }
        });
        assert_eq!(text.0.header().owners.count(), 1);
    }

    #[test]
    fn lazy_bytes_are_made_once() {
        let lazy = Lazy::default();
        assert!(lazy.get().is_none());
        std::thread::scope(|s| {
            for n in 0..4_u8 {
                let lazy = &lazy;
                s.spawn(move || lazy.get_or_set(&[n]).len());
            }
        });
        let first = lazy.get().map(<[u8]>::to_vec);
        assert_eq!(Some(lazy.get_or_set(b"later").to_vec()), first);
    }
}
