//! Immutable rows and the keys that name them.
//!
//! An executor holds millions of rows, so a row is one allocation: a count of owners, version,
//! wire JSON (a pointer each) and the values; and whoever holds it has one pointer
//! ([`RowRef`]). docs/engine.md has the sum.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::convert::Infallible;
use std::fmt;
use std::ops::Deref;
use std::ptr::{self, NonNull};

use crate::owners::Owners;
#[cfg(test)]
use crate::owners::tally;
use crate::schema::{TableId, TableSpec};
use crate::text::Lazy;
use crate::value::Value;
use crate::version::StateVersion;

/// A row as replicated: the visible columns of its table, in the order of
/// [`TableSpec::columns`], and the version that last wrote it. Shared by reference; never changed.
#[derive(Debug)]
#[repr(C)]
pub struct Row {
    /// `_0_version` of the row, already raised to the table's `minRowVersion`.
    pub version: StateVersion,
    /// The row as the JSON object of a `rowsPatch` put, made at most once (see `crate::json`).
    pub wire_json: Lazy,
    /// One value per visible column.
    pub values: [Value],
}

/// What precedes a row.
#[repr(C)]
struct Prefix {
    owners: Owners,
    columns: u32,
}

/// The allocation of a row. Its columns' number is needed to know how long it is: hence
/// [`Prefix`], to read that first.
#[repr(C)]
struct Counted {
    prefix: Prefix,
    row: Row,
}

/// The part of [`Counted`] that has always the same size.
#[repr(C)]
struct Head {
    prefix: Prefix,
    version: StateVersion,
    wire_json: Lazy,
}

/// An owner of a [`Row`]: one pointer.
pub struct RowRef(NonNull<Prefix>);

// SAFETY: rows never change (but for the lazy JSON, which is made atomically), what they consist
// of may be shared between threads, and the owners are counted atomically.
unsafe impl Send for RowRef {}
// SAFETY: as above.
unsafe impl Sync for RowRef {}

impl Row {
    /// A row of the given version and values.
    #[allow(clippy::new_ret_no_self)] // A row is only ever made to be shared.
    pub fn new<I>(version: StateVersion, values: I) -> RowRef
    where
        I: IntoIterator<Item = Value>,
        I::IntoIter: ExactSizeIterator,
    {
        let mut values = values.into_iter();
        let columns = values.len();
        let next = |_| Ok::<_, Infallible>(values.next().unwrap_or(Value::Null));
        match Row::try_new(version, columns, next) {
            Ok(row) => row,
        }
    }

    /// A row of the given version, and of `columns` values that are asked for in order.
    ///
    /// # Errors
    /// The first error of `value`.
    pub fn try_new<E>(
        version: StateVersion,
        columns: usize,
        mut value: impl FnMut(usize) -> Result<Value, E>,
    ) -> Result<RowRef, E> {
        let mut row = RowRef::nulls(version, columns);
        for (i, place) in row.values_mut().iter_mut().enumerate() {
            *place = value(i)?;
        }
        Ok(row)
    }

    /// The values of the named columns, in their order.
    pub fn project(&self, columns: &[usize]) -> Key {
        columns.iter().map(|&c| self.values[c].clone()).collect()
    }
}

impl RowRef {
    fn layout(columns: usize) -> Layout {
        let values = Layout::array::<Value>(columns);
        match values.and_then(|values| Layout::new::<Head>().extend(values)) {
            Ok((layout, _)) => layout.pad_to_align(),
            Err(_) => Layout::new::<Head>(),
        }
    }

    /// A row of nulls.
    ///
    /// # Panics
    /// With 2^32 columns; Postgres has at most 1,600.
    fn nulls(version: StateVersion, columns: usize) -> RowRef {
        assert!(u32::try_from(columns).is_ok(), "{columns} columns are no table");
        let layout = RowRef::layout(columns);
        // SAFETY: the layout is that of a `Counted` of so many values, hence not empty. Every field
        // is written before it is read: the prefix, the row's head, and each value.
        unsafe {
            let Some(at) = NonNull::new(alloc(layout).cast::<Prefix>()) else {
                handle_alloc_error(layout)
            };
            at.write(Prefix { owners: Owners::one(), columns: columns as u32 });
            let counted = RowRef::counted(at);
            (&raw mut (*counted).row.version).write(version);
            (&raw mut (*counted).row.wire_json).write(Lazy::default());
            let values = (&raw mut (*counted).row.values).cast::<Value>();
            for i in 0..columns {
                values.add(i).write(Value::Null);
            }
            RowRef(at)
        }
    }

    /// The allocation whose prefix is at `at`.
    ///
    /// # Safety
    /// `at` must come from [`RowRef::nulls`], and must not be freed yet.
    unsafe fn counted(at: NonNull<Prefix>) -> *mut Counted {
        // SAFETY: the prefix was written first of all.
        let columns = unsafe { at.as_ref() }.columns as usize;
        // A pointer to `Counted` carries the number of values, as one to a slice does.
        ptr::slice_from_raw_parts_mut(at.as_ptr().cast::<Value>(), columns) as *mut Counted
    }

    fn prefix(&self) -> &Prefix {
        // SAFETY: an owner keeps the allocation alive, and nobody writes but to the count.
        unsafe { self.0.as_ref() }
    }

    /// The values of a row that nobody else has seen yet.
    fn values_mut(&mut self) -> &mut [Value] {
        assert_eq!(self.owners(), 1, "a row that is shared never changes");
        // SAFETY: `self` is the only owner, and is borrowed for as long as the result is.
        unsafe { &mut (*RowRef::counted(self.0)).row.values }
    }

    /// How many owners there are.
    pub fn owners(&self) -> usize {
        self.prefix().owners.count() as usize
    }

    /// Whether both are the same row in memory.
    pub fn ptr_eq(a: &RowRef, b: &RowRef) -> bool {
        a.0 == b.0
    }
}

impl Deref for RowRef {
    type Target = Row;

    fn deref(&self) -> &Row {
        #[cfg(test)]
        tally::row();
        // SAFETY: `nulls` made a whole row, which lives as long as it has an owner.
        unsafe { &(*RowRef::counted(self.0)).row }
    }
}

impl Clone for RowRef {
    fn clone(&self) -> RowRef {
        #[cfg(test)]
        tally::row();
        self.prefix().owners.join();
        RowRef(self.0)
    }
}

impl Drop for RowRef {
    fn drop(&mut self) {
        #[cfg(test)]
        tally::row();
        if !self.prefix().owners.leave() {
            return;
        }
        let layout = RowRef::layout(self.prefix().columns as usize);
        // SAFETY: this was the last owner; the allocation has that layout, and its row is whole.
        unsafe {
            ptr::drop_in_place(&raw mut (*RowRef::counted(self.0)).row);
            dealloc(self.0.as_ptr().cast::<u8>(), layout);
        }
    }
}

impl fmt::Debug for RowRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// Column values that name a row or a join partition.
pub type Key = smallvec::SmallVec<[Value; 2]>;

/// A row's identity inside one executor: the table, and the values of its identity key
/// ([`TableSpec::primary_key`]) in key order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId {
    /// The table.
    pub table: TableId,
    /// Values of the identity key columns, in key order.
    pub key: Key,
}

impl RowId {
    /// The identity of `row` in `table`.
    pub fn of(table: &TableSpec, row: &Row) -> RowId {
        RowId { table: table.id, key: row.project(&table.primary_key) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_one_pointer_and_one_allocation() {
        assert_eq!(size_of::<Option<RowRef>>(), size_of::<usize>());
        assert_eq!(size_of::<Head>(), 24);
        for columns in [0, 1, 5, 100] {
            let values = (0..columns).map(|i| Value::string(i.to_string()));
            let row = Row::new(StateVersion::from_lsn(7), values.collect::<Vec<_>>());
            assert_eq!(size_of_val(&*row) + size_of::<Prefix>(), RowRef::layout(columns).size());
            let again = row.clone();
            assert_eq!((row.owners(), RowRef::ptr_eq(&row, &again)), (2, true));
            drop(row);
            assert_eq!((again.owners(), again.values.len()), (1, columns));
            let expected = (0..columns).map(|i| Value::string(i.to_string()));
            assert!(again.values.iter().cloned().eq(expected));
            assert_eq!(again.version, StateVersion::from_lsn(7));
        }
    }

    #[test]
    fn a_row_that_cannot_be_made_leaves_nothing_behind() {
        let text = Value::string("shared");
        let value = |i| if i < 3 { Ok(text.clone()) } else { Err("no value") };
        assert!(Row::try_new(StateVersion::zero(), 5, value).is_err());
        let row = Row::try_new(StateVersion::zero(), 3, value).unwrap();
        assert_eq!(row.project(&[2, 0]).as_slice(), [text.clone(), text.clone()]);
    }
}
