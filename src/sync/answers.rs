//! Answers from other threads (the CVR store's) to an executor.
//!
//! A store answers on several threads, so this is a mailbox rather than a ring. The lock is held
//! for one push or one swap; the store answers per batch, not per row.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use zeroring_core::cvr::store::{CatchupPage, CvrStoreError, Flushed, Loaded, RowPage};
use zeroring_net::rt::Ringer;

use super::groups::GroupKey;

/// What the store says.
#[derive(Debug)]
pub(super) enum StoreAnswer {
    Loaded(GroupKey, Result<Box<Loaded>, CvrStoreError>),
    Rows(GroupKey, Result<RowPage, CvrStoreError>),
    CaughtUp(GroupKey, Result<CatchupPage, CvrStoreError>),
    RowsWritten(GroupKey, Result<(), CvrStoreError>),
    /// Verdicts of a batch.
    Flushed {
        /// All that did not have to wait: the next batch may go. Later ones are stragglers.
        first: bool,
        verdicts: Vec<(GroupKey, Result<Flushed, CvrStoreError>)>,
    },
}

/// Where the store's threads put answers.
#[derive(Debug)]
pub(super) struct Mailbox {
    answers: Mutex<Vec<StoreAnswer>>,
    full: AtomicBool,
    ringer: Ringer,
}

impl Mailbox {
    pub(super) fn new(ringer: Ringer) -> Arc<Mailbox> {
        Arc::new(Mailbox { answers: Mutex::default(), full: AtomicBool::new(false), ringer })
    }

    /// Puts an answer in and wakes the executor.
    pub(super) fn put(&self, answer: StoreAnswer) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
        self.full.store(true, Ordering::SeqCst);
        self.ringer.ring();
    }

    /// Something is there.
    pub(super) fn has_answers(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    /// Takes everything out.
    pub(super) fn take(&self) -> Vec<StoreAnswer> {
        if !self.full.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        std::mem::take(&mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
